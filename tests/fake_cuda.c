/* A libcuda.so.1 without a GPU: it answers as an H100's would, and hands every launch to an observer instead of running
 * it.  So Triton's own compiler, cache and launcher can be driven on any machine (triton_launched.py). */
#include <stddef.h>
#include <stdint.h>

enum { MULTIPROCESSORS = 16, SHARED = 8, MAJOR = 75, MINOR = 76, SHARED_OF_ALL = 81, SHARED_OPTIN = 97 };
enum { MAX_THREADS_OF_FUNCTION = 0, LOCAL_BYTES = 3, REGISTERS = 4 };

static void (*observer)(const unsigned *config, uintptr_t function, void **arguments);
static uintptr_t modules;

void fake_observe(void (*function)(const unsigned *, uintptr_t, void **)) { observer = function; }

int cuLaunchKernelEx(const unsigned *config, uintptr_t function, void **arguments, void **extra) {
  observer(config, function, arguments); /* config: grid x y z, block x y z, bytes of shared memory, ... */
  return 0;
}

int cuModuleLoadData(uintptr_t *module, const void *image) { *module = ++modules; return 0; }
int cuModuleGetFunction(uintptr_t *function, uintptr_t module, const char *name) { *function = module; return 0; }
int cuModuleUnload(uintptr_t module) { return 0; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case MAJOR: *value = 9; break;
    case MINOR: *value = 0; break;
    case MULTIPROCESSORS: *value = 132; break;
    case SHARED: *value = 48 << 10; break;
    case SHARED_OF_ALL: *value = 228 << 10; break;
    case SHARED_OPTIN: *value = 227 << 10; break;
    default: *value = 1;
  }
  return 0;
}

int cuFuncGetAttribute(int *value, int attribute, uintptr_t function) {
  *value = attribute == MAX_THREADS_OF_FUNCTION ? 1024 : attribute == REGISTERS ? 100 : 0;
  return 0;
}

int cuPointerGetAttribute(uint64_t *value, int attribute, uint64_t pointer) { *value = pointer; return 0; }

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuCtxGetCurrent(uintptr_t *context) { *context = 1; return 0; }
int cuCtxSetCurrent(uintptr_t context) { return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
int cuDevicePrimaryCtxRetain(uintptr_t *context, int device) { *context = 1; return 0; }
int cuFuncSetAttribute(uintptr_t function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(uintptr_t function, int config) { return 0; }
int cuGetErrorString(int error, const char **text) { *text = "no GPU"; return 0; }
int cuOccupancyMaxActiveClusters(int *clusters, uintptr_t function, const void *config) { *clusters = 1; return 0; }
int cuTensorMapEncodeTiled(void) { return 1; }
int cuTensorMapEncodeIm2col(void) { return 1; }
