/* The part of NVIDIA's management library that gauges.py calls, with the prototypes of nvml.h: two
   GPUs, of which the second one does not tell its power. NVML_FAILS in the environment: a driver
   that does not answer. */

#include <stdlib.h>

typedef int nvmlReturn_t;
typedef struct gpu { unsigned number; } *nvmlDevice_t;
typedef struct { unsigned long long total, free, used; } nvmlMemory_t;

#define NOT_SUPPORTED 3
#define DRIVER_NOT_LOADED 9

static struct gpu gpus[2] = {{0}, {1}};

nvmlReturn_t nvmlInitWithFlags(unsigned flags) {
    return getenv("NVML_FAILS") ? DRIVER_NOT_LOADED : (nvmlReturn_t)flags;
}
const char *nvmlErrorString(nvmlReturn_t code) { return code ? "no" : "yes"; }
nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *gpu) {
    *gpu = &gpus[index];
    return 0;
}
nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t gpu, unsigned *milliwatts) {
    *milliwatts = 61500;
    return gpu->number == 0 ? 0 : NOT_SUPPORTED;
}
nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t gpu, nvmlMemory_t *memory) {
    memory->used = 1000 + 10 * gpu->number;
    return 0;
}
