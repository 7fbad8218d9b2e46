/* NVML on a card that is not there. It counts cards backwards, so that its index is not CUDA's. */
#include "device.h"

typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned long long total, free, used; } Memory;

static void *handle_of(int card) { return (void *)(size_t)(card + 1); }
static int card_of(void *handle) { return (int)(size_t)handle - 1; }

int nvmlDeviceGetCount_v2(unsigned *count) { *count = cards_of_machine(); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
  *handle = handle_of(cards_of_machine() - 1 - (int)index);
  return (int)index < cards_of_machine() ? 0 : 2;
}
static int uuid_text(int card, char *text, unsigned size) {
  unsigned char b[16];
  uuid_of(card, b);
  snprintf(text, size, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b[0], b[1], b[2], b[3],
           b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]);
  return 0;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
  char text[64];
  for (int card = 0; card < cards_of_machine(); card++)
    if (uuid_text(card, text, sizeof text), !strcmp(text, uuid)) { *handle = handle_of(card); return 0; }
  return 6; /* not found */
}
int nvmlDeviceGetUUID(void *handle, char *text, unsigned size) { return uuid_text(card_of(handle), text, size); }
int nvmlDeviceGetName(void *handle, char *name, unsigned size) { snprintf(name, size, "%s", card_name()); return 0; }
/* a thousand MHz and one more for each card: a reading names the card it is of */
int nvmlDeviceGetClockInfo(void *handle, int kind, unsigned *mhz) { *mhz = 1000 + card_of(handle); return 0; }
int nvmlDeviceGetMaxClockInfo(void *handle, int kind, unsigned *mhz) { *mhz = 1410; return 0; }
int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *celsius) { *celsius = 40; return 0; }
int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) { *milliwatts = 100000; return 0; }
int nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned *milliwatts) { *milliwatts = 400000; return 0; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, unsigned long long *reasons) {
  *reasons = number_of("FAKE_CUDA_THROTTLE", 0);
  return 0;
}
int nvmlDeviceGetCurrentClocksEventReasons(void *handle, unsigned long long *reasons) {
  return nvmlDeviceGetCurrentClocksThrottleReasons(handle, reasons);
}
int nvmlDeviceGetUtilizationRates(void *handle, Utilization *found) { found->gpu = 99; found->memory = 50; return 0; }
int nvmlDeviceGetMemoryInfo(void *handle, Memory *found) {
  found->total = card_memory();
  found->used = 0;
  found->free = found->total;
  return 0;
}
/* what torch asks for when memory is out */
int nvmlInit_v2(void) { return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = driver_version(); return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **handle) { *handle = handle_of(0); return 0; }
int nvmlDeviceGetComputeRunningProcesses(void *handle, unsigned *count, void *found) { *count = 0; return 0; }
int nvmlDeviceGetNvLinkRemoteDeviceType(void) { return 3; } /* not supported */
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void) { return 3; }
int nvmlDeviceGetGpuFabricInfoV(void) { return 3; }
const char *nvmlErrorString(int error) { return error ? "an error of the fake driver" : "Success"; }
