/* The part of the CUDA driver that engines/cuda.py calls, on host memory, with the prototypes of
   cuda.h. It refuses calls from a thread without a context, as the driver does. */

#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef int CUdevice;
typedef void *CUcontext;
typedef void *CUstream;
typedef unsigned long long CUdeviceptr;

#define INVALID_VALUE 1
#define OUT_OF_MEMORY 2
#define INVALID_CONTEXT 201

static char context, stream;
static __thread CUcontext current;
static char *block;
static size_t block_size;

static CUresult inside(CUdeviceptr p, size_t n) {
    char *at = (char *)(size_t)p;
    return block && at >= block && at + n <= block + block_size ? 0 : INVALID_VALUE;
}

#define NEED_CONTEXT if (current != &context) return INVALID_CONTEXT
#define NEED_STREAM if (s != &stream) return INVALID_VALUE

CUresult cuInit(unsigned flags) {
    const char *number = getenv("FAKE_CUINIT");
    return number ? atoi(number) : (int)flags;
}
CUresult cuDeviceGet(CUdevice *d, int ordinal) { *d = 7; return ordinal; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) {
    *c = &context;
    return d == 7 ? 0 : INVALID_VALUE;
}
CUresult cuCtxSetCurrent(CUcontext c) {
    current = c;
    return c == &context ? 0 : INVALID_CONTEXT;
}
CUresult cuDeviceGetName(char *name, int size, CUdevice d) {
    strncpy(name, "Orin", size);
    return d == 7 ? 0 : INVALID_VALUE;
}
CUresult cuDeviceGetAttribute(int *value, int which, CUdevice d) {
    *value = which == 75 ? 8 : which == 76 ? 7 : -1;
    return d == 7 ? 0 : INVALID_VALUE;
}
CUresult cuStreamCreate(CUstream *s, unsigned flags) {
    NEED_CONTEXT;
    *s = &stream;
    return flags == 1 ? 0 : INVALID_VALUE;
}
CUresult cuStreamSynchronize(CUstream s) {
    NEED_CONTEXT;
    NEED_STREAM;
    return 0;
}
CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
    NEED_CONTEXT;
    *available = 5000000000ull;
    *total = 8000000000ull;
    return 0;
}
CUresult cuMemAlloc_v2(CUdeviceptr *p, size_t n) {
    NEED_CONTEXT;
    if (n > 1u << 20) return OUT_OF_MEMORY;
    block = calloc(1, n);
    block_size = n;
    *p = (CUdeviceptr)(size_t)block;
    return 0;
}
CUresult cuMemFree_v2(CUdeviceptr p) {
    NEED_CONTEXT;
    if (inside(p, 0)) return INVALID_VALUE;
    free(block);
    block = 0;
    return 0;
}
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t n, CUstream s) {
    NEED_CONTEXT;
    NEED_STREAM;
    if (inside(to, n)) return INVALID_VALUE;
    memcpy((void *)(size_t)to, from, n);
    return 0;
}
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t n, CUstream s) {
    NEED_CONTEXT;
    NEED_STREAM;
    if (inside(from, n)) return INVALID_VALUE;
    memcpy(to, (void *)(size_t)from, n);
    return 0;
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s) {
    NEED_CONTEXT;
    NEED_STREAM;
    if (inside(to, n) || inside(from, n)) return INVALID_VALUE;
    memcpy((void *)(size_t)to, (void *)(size_t)from, n);
    return 0;
}
CUresult cuPointerGetAttribute(void *value, int which, CUdeviceptr p) {
    NEED_CONTEXT;
    if (which != 2 || inside(p, 1)) return INVALID_VALUE;
    *(unsigned *)value = 2;
    return 0;
}
CUresult cuGetErrorString(CUresult code, const char **text) {
    *text = code == OUT_OF_MEMORY ? "out of memory" : "invalid argument";
    return 0;
}
