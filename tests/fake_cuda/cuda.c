/* CUDA's driver API on a card that is not there; what the runtime's stub does not answer itself. */
#define _GNU_SOURCE
#include "device.h"
#include <dlfcn.h>

static int nothing(void) { return 0; }

int cuInit(unsigned flags) { return visible_count() ? 0 : 100; }
int cuDriverGetVersion(int *version) { *version = driver_version(); return 0; }
int cuDeviceGetCount(int *count) { *count = visible_count(); return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return physical(ordinal) < 0 ? 101 : 0; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "%s", card_name()); return 0; }
int cuDeviceGetUuid(unsigned char *uuid, int device) { uuid_of(physical(device), uuid); return 0; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) { return cuDeviceGetUuid(uuid, device); }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = card_memory(); return 0; }
int cuDeviceComputeCapability(int *major, int *minor, int device) {
  *major = capability() / 10;
  *minor = capability() % 10;
  return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? capability() / 10 : attribute == 76 ? capability() % 10 : attribute == 16 ? processors()
           : attribute == 20 && getenv("FAKE_CUDA_EXCLUSIVE") ? 3 : 0;
  return 0;
}
int cuCtxGetCurrent(void **context) { *context = HANDLE; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = HANDLE; return context_on(device); }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  if (flags) *flags = 0;
  *active = 1;
  return 0;
}
int cuModuleLoadData(void **module) { *module = HANDLE; return 0; }
int cuModuleLoadDataEx(void **module) { *module = HANDLE; return 0; }
int cuModuleGetFunction(void **function) { *function = HANDLE; return 0; }
int cuFuncGetAttribute(int *value) { *value = 0; return 0; }
int cuGetErrorString(int error, const char **text) { *text = error ? "an error of the fake driver" : "no error"; return 0; }
int cuGetErrorName(int error, const char **text) { return cuGetErrorString(error, text); }
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *status) {
  void *found = dlsym(RTLD_DEFAULT, name);
  *function = found ? found : (void *)nothing;
  if (status) *status = 0;
  return 0;
}
