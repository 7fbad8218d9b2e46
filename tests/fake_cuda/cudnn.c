/* cuDNN on a card that is not there: every graph of operations has one plan, which needs no workspace. */
#include "device.h"
#include <cudnn_backend.h>

size_t cudnnGetVersion(void) { return CUDNN_VERSION; }
size_t cudnnGetCudartVersion(void) { return 13000; }
size_t cudnnGetMaxDeviceVersion(void) { return 1210; }
const char *cudnnGetErrorString(cudnnStatus_t status) { return status ? "CUDNN_STATUS of the fake driver" : "CUDNN_STATUS_SUCCESS"; }
void cudnnGetLastErrorString(char *message, size_t size) { if (size) *message = 0; }
cudnnStatus_t cudnnGetProperty(libraryPropertyType kind, int *value) {
  *value = kind == 0 ? CUDNN_MAJOR : kind == 1 ? CUDNN_MINOR : CUDNN_PATCHLEVEL;
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t *stream) { *stream = NULL; return CUDNN_STATUS_SUCCESS; }

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t kind, cudnnBackendDescriptor_t *found) {
  *found = calloc(1, 64);
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t const descriptor, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t wanted, int64_t *count, void *values) {
  int64_t found = 0;
  switch (name) {
    case CUDNN_ATTR_ENGINEHEUR_RESULTS: /* one configuration of an engine */
    case CUDNN_ATTR_ENGINECFG_ENGINE:
    case CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE:
    case CUDNN_ATTR_ENGINECFG_WORKSPACE_SIZE:
    case CUDNN_ATTR_ENGINECFG_SHARED_MEMORY_USED:
    case CUDNN_ATTR_ENGINE_GLOBAL_INDEX:
    case CUDNN_ATTR_OPERATIONGRAPH_ENGINE_GLOBAL_COUNT:
      found = 1;
      break;
    default: /* notes of engines, knobs: none */
      break;
  }
  /* descriptors are made by the caller and only filled here */
  if (found && wanted > 0 && values && type != CUDNN_TYPE_BACKEND_DESCRIPTOR) memset(values, 0, type == CUDNN_TYPE_INT32 ? 4 : 8);
  if (found && values && wanted > 0 && name == CUDNN_ATTR_OPERATIONGRAPH_ENGINE_GLOBAL_COUNT) *(int64_t *)values = 1;
  if (count) *count = found;
  return CUDNN_STATUS_SUCCESS;
}
