/* cuBLAS on a card that is not there. */
#include "device.h"

int cublasGetVersion_v2(void *handle, int *version) { *version = 130100; return 0; }
int cublasGetProperty(int kind, int *value) { *value = kind == 0 ? 13 : 1; return 0; }
int cublasGetStream_v2(void *handle, void **stream) { *stream = NULL; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
const char *cublasGetStatusString(int status) { return "a status of the fake driver"; }
const char *cublasGetStatusName(int status) { return "a status of the fake driver"; }
