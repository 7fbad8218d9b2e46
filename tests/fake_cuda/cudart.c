/* CUDA's runtime on a card that is not there: memory is the host's, kernels do nothing. */
#define _GNU_SOURCE
#include "device.h"
#include <dlfcn.h>
#include <driver_types.h>

static __thread int current;
static __thread int failed; /* the last error, as cudaGetLastError gives it */
static size_t used;
static int capturing;

static int nothing(void) { return 0; }
static int fail(int error) { return failed = error; }

int cudaGetDeviceCount(int *count) {
  *count = driver_version() < 13000 ? 0 : visible_count();
  return *count ? 0 : fail(driver_version() < 13000 ? 35 : 100);
}
int cudaGetDevice(int *device) { *device = current; return 0; }
int cudaSetDevice(int device) {
  int error = context_on(device);
  if (error) return fail(error);
  current = device;
  return 0;
}
int cudaInitDevice(int device, unsigned a, unsigned b) { return context_on(device); }
int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  int card = physical(device);
  if (card < 0) return fail(101);
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", card_name());
  uuid_of(card, (unsigned char *)p->uuid.bytes);
  p->major = capability() / 10;
  p->minor = capability() % 10;
  p->multiProcessorCount = processors();
  p->totalGlobalMem = card_memory();
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 166912;
  p->sharedMemPerMultiprocessor = 167936;
  p->reservedSharedMemPerBlock = 1024;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->l2CacheSize = 41943040;
  p->totalConstMem = 65536;
  p->memoryBusWidth = 5120;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->pciBusID = card + 1;
  p->unifiedAddressing = p->concurrentKernels = p->canMapHostMemory = 1;
  return 0;
}
int cudaGetDeviceProperties_v2(struct cudaDeviceProp *p, int device) { return cudaGetDeviceProperties(p, device); }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = capability() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability() % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = processors(); break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 166912; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 167936; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: *value = 65535; break;
    case cudaDevAttrComputeMode: *value = getenv("FAKE_CUDA_EXCLUSIVE") ? 3 : 0; break;
    case cudaDevAttrL2CacheSize: *value = 41943040; break;
    case cudaDevAttrUnifiedAddressing: *value = 1; break;
    default: *value = 0;
  }
  return 0;
}
int cudaDeviceGetPCIBusId(char *id, int size, int device) {
  snprintf(id, size, "0000:%02X:00.0", physical(device) + 1);
  return 0;
}
int cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return 0;
}
int cudaDriverGetVersion(int *version) { *version = driver_version(); return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }

/* errors: those this driver gives have CUDA's own words */
static const char *words(int error) {
  switch (error) {
    case 0: return "no error";
    case 2: return "out of memory";
    case 35: return "CUDA driver version is insufficient for CUDA runtime version";
    case 46: return "CUDA-capable device(s) is/are busy or unavailable";
    case 100: return "no CUDA-capable device is detected";
    case 101: return "invalid device ordinal";
    case 209: return "no kernel image is available for execution on the device";
    default: return "an error of the fake driver";
  }
}
const char *cudaGetErrorString(int error) { return words(error); }
const char *cudaGetErrorName(int error) { return words(error); }
int cudaGetLastError(void) { int error = failed; failed = 0; return error; }
int cudaPeekAtLastError(void) { return failed; }

/* memory: zeros, its size in front of it, and no more of it than the card has */
int cudaMalloc(void **pointer, size_t bytes) {
  int error = context_on(current);
  if (error) return fail(error);
  *pointer = NULL;
  if (used + bytes > card_memory()) return fail(2);
  char *block = calloc(1, bytes + 512);
  if (!block) return fail(2);
  char *start = (char *)(((size_t)block + 512) & ~(size_t)255);
  ((void **)start)[-1] = block;
  ((size_t *)start)[-2] = bytes;
  used += bytes;
  *pointer = start;
  return 0;
}
int cudaFree(void *pointer) {
  if (!pointer) return context_on(current);
  used -= ((size_t *)pointer)[-2];
  free(((void **)pointer)[-1]);
  return 0;
}
int cudaMallocAsync(void **pointer, size_t bytes, void *stream) { return cudaMalloc(pointer, bytes); }
int cudaFreeAsync(void *pointer, void *stream) { return cudaFree(pointer); }
static int pinned(void **pointer, size_t bytes) {
  *pointer = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096 + 4096);
  return *pointer ? 0 : fail(2);
}
int cudaMallocHost(void **pointer, size_t bytes) { return pinned(pointer, bytes); }
int cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) { return pinned(pointer, bytes); }
int cudaFreeHost(void *pointer) { free(pointer); return 0; }
int cudaHostGetDevicePointer(void **device, void *host, unsigned flags) { *device = host; return 0; }
int cudaMemGetInfo(size_t *unused, size_t *total) {
  *total = card_memory();
  *unused = *total - used;
  return 0;
}
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
  if (kind == cudaMemcpyDeviceToHost && number_of("FAKE_CUDA_ZEROS", 0)) memset(to, 0, bytes);
  else memmove(to, from, bytes);
  return 0;
}
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
  return cudaMemcpy(to, from, bytes, kind);
}
int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                      int kind, void *stream) {
  for (size_t row = 0; row < height; row++)
    memmove((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
  return 0;
}
int cudaMemset(void *to, int value, size_t bytes) { memset(to, value, bytes); return 0; }
int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) { memset(to, value, bytes); return 0; }
int cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
  memset(found, 0, sizeof *found);
  found->type = cudaMemoryTypeDevice;
  found->device = current;
  found->devicePointer = (void *)pointer;
  return 0;
}
int cudaGetSymbolAddress(void **pointer, const void *symbol) {
  static char memory[1 << 20];
  *pointer = memory;
  return 0;
}
int cudaDeviceGetDefaultMemPool(void **pool, int device) { *pool = HANDLE; return 0; }
int cudaMemPoolGetAttribute(void *pool, int attribute, void *value) { memset(value, 0, 8); return 0; }
int cudaDeviceGetGraphMemAttribute(int device, int attribute, void *value) { memset(value, 0, 8); return 0; }

/* streams and events: everything is done at once */
int cudaStreamCreate(void **stream) { return cudaMalloc(stream, 8); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return cudaMalloc(stream, 8); }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return cudaMalloc(stream, 8); }
int cudaStreamGetPriority(void *stream, int *priority) { *priority = 0; return 0; }
int cudaStreamGetDevice(void *stream, int *device) { *device = current; return 0; }
int cudaEventCreate(void **event) { *event = HANDLE; return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = HANDLE; return 0; }
int cudaEventElapsedTime(float *ms, void *start, void *end) { *ms = 1.0f; return 0; }
int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) { function(data); return 0; }
int cudaStreamAddCallback(void *stream, void (*function)(void *, int, void *), void *data, unsigned flags) {
  function(stream, 0, data);
  return 0;
}

/* graphs: a capture holds nothing, and its replay does nothing */
int cudaStreamBeginCapture(void *stream, int mode) { capturing = 1; return 0; }
int cudaStreamBeginCaptureToGraph(void *s, void *g, const void *d, const void *e, size_t n, int m) {
  capturing = 1;
  return 0;
}
int cudaStreamEndCapture(void *stream, void **graph) { capturing = 0; *graph = HANDLE; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = capturing; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id, void **graph, const void **d,
                             const void **e, size_t *count) {
  *status = capturing;
  if (id) *id = 1;
  if (graph) *graph = HANDLE;
  if (d) *d = NULL;
  if (e) *e = NULL;
  if (count) *count = 0;
  return 0;
}
int cudaGraphGetNodes(void *graph, void *nodes, size_t *count) { *count = 0; return 0; }
int cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags) { *executable = HANDLE; return 0; }
int cudaGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
  *executable = HANDLE;
  return 0;
}
int cudaThreadExchangeStreamCaptureMode(int *mode) { return 0; }
int cudaUserObjectCreate(void **object, void *data, void *destroy, unsigned count, unsigned flags) {
  *object = HANDLE;
  return 0;
}

/* kernels */
void **__cudaRegisterFatBinary(void *binary) { static void *handle[4]; return handle; }
static int launch(void) { return number_of("FAKE_CUDA_KERNELS", 1) ? 0 : fail(209); }
int cudaLaunchKernel(void) { return launch(); }
int __cudaLaunchKernel(void) { return launch(); }
int cudaLaunchKernelExC(void) { return launch(); }
unsigned __cudaPushCallConfiguration(void) { return 0; }
int cudaLibraryLoadData(void **library) { *library = HANDLE; return 0; }
int cudaLibraryGetKernel(void **kernel, void *library, const char *name) { *kernel = HANDLE; return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count) { *count = 1; return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count) { *count = 1; return 0; }
int cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->binaryVersion = found->ptxVersion = capability();
  return 0;
}
static int entry(const char *name, void **function, int *status) {
  void *found = dlsym(RTLD_DEFAULT, name);
  *function = found ? found : (void *)nothing;
  if (status) *status = 0;
  return 0;
}
int cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags, int *status) {
  return entry(name, function, status);
}
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                     int *status) {
  return entry(name, function, status);
}
