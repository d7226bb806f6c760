/* A stand-in for libnvidia-ml.so.1: a desktop's RTX 4090, and an A100 divided by MIG whose one part has number 1.
   Environment: STAND_IN_NVML holds words that change it (wsl, no_memory, lost, no_driver, idle); STAND_IN_PID is a process on the
   first card, with STAND_IN_OWN_MIB; STAND_IN_OTHERS_MIB is held by process 4200001 there. */
#include <stdlib.h>
#include <string.h>

typedef unsigned long long u64;
typedef struct { unsigned version; u64 total, reserved, free, used; } memory_v2;
typedef struct { u64 total, free, used; } memory_v1;
typedef struct { unsigned pid; u64 used; unsigned gpu, compute; } process;
typedef struct { unsigned gpu, memory; } utilization;
typedef struct { const char *name, *uuid; u64 total_mib; int part; } card;

enum { OK = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, NO_DRIVER = 9, LOST = 15 };
static card cards[] = {
    {"NVIDIA GeForce RTX 4090", "GPU-11111111-aaaa", 24564, 0},
    {"NVIDIA A100-SXM4-40GB", "GPU-22222222-bbbb", 40960, 0},
    {"NVIDIA A100-SXM4-40GB MIG 1g.5gb", "MIG-33333333-cccc", 4864, 1},
};
#define RESERVED_MIB 400

static int mode(const char *word) { const char *modes = getenv("STAND_IN_NVML"); return modes && strstr(modes, word); }
static u64 number(const char *name, u64 otherwise) { const char *text = getenv(name); return text ? strtoull(text, 0, 10) : otherwise; }
static u64 used_mib(card *c) { return c == cards ? number("STAND_IN_OWN_MIB", 0) + number("STAND_IN_OTHERS_MIB", 1024) + 300 : 100; }
#define ANSWER(name, ...) int name(__VA_ARGS__) { if (mode("lost")) return LOST;

int nvmlInitWithFlags(unsigned flags) { return mode("no_driver") ? NO_DRIVER : OK; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return "an error of the stand-in"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strcpy(text, "595.71"); return OK; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, card **handle) { *handle = cards + index; return OK; }
ANSWER(nvmlDeviceGetHandleByUUID, const char *uuid, card **handle)
    for (int i = 0; i < 3; i++) if (!strcmp(cards[i].uuid, uuid)) { *handle = cards + i; return OK; }
    return NOT_FOUND; }
ANSWER(nvmlDeviceGetName, card *c, char *text, unsigned size) strcpy(text, c->name); return OK; }
ANSWER(nvmlDeviceGetUUID, card *c, char *text, unsigned size) strcpy(text, c->uuid); return OK; }
ANSWER(nvmlDeviceGetMemoryInfo_v2, card *c, memory_v2 *m)
    m->total = c->total_mib << 20; m->reserved = (u64)RESERVED_MIB << 20; m->used = used_mib(c) << 20;
    m->free = m->total - m->reserved - m->used; if (mode("no_memory")) m->used = ~0ull; return OK; }
ANSWER(nvmlDeviceGetMemoryInfo, card *c, memory_v1 *m)
    m->total = c->total_mib << 20; m->used = used_mib(c) << 20; m->free = m->total - m->used; return OK; }
ANSWER(nvmlDeviceGetCudaComputeCapability, card *c, int *major, int *minor) *major = 8; *minor = c == cards ? 9 : 0; return OK; }
ANSWER(nvmlDeviceGetUtilizationRates, card *c, utilization *u) if (c->part) return NOT_SUPPORTED; u->gpu = mode("idle") ? 0 : 97; u->memory = 40; return OK; }
ANSWER(nvmlDeviceGetPowerUsage, card *c, unsigned *mw) if (c->part || mode("wsl")) return NOT_SUPPORTED; *mw = c == cards ? 382000 : 210000; return OK; }
ANSWER(nvmlDeviceGetTemperature, card *c, int sensor, unsigned *t) if (c->part) return NOT_SUPPORTED; *t = c == cards ? 71 : 55; return OK; }
ANSWER(nvmlDeviceGetCurrentClocksEventReasons, card *c, u64 *bits) if (c->part) return NOT_SUPPORTED; *bits = mode("idle") ? 1 : 0x4 | 0x40; return OK; }
ANSWER(nvmlDeviceGetMigMode, card *c, unsigned *now, unsigned *later) if (c == cards) return NOT_SUPPORTED; *now = *later = 1; return OK; }
ANSWER(nvmlDeviceGetMaxMigDeviceCount, card *c, unsigned *count) *count = 7; return OK; }
ANSWER(nvmlDeviceGetMigDeviceHandleByIndex, card *c, unsigned index, card **part) if (index != 1) return NOT_FOUND; *part = cards + 2; return OK; }
ANSWER(nvmlDeviceGetDeviceHandleFromMigDeviceHandle, card *c, card **whole) if (!c->part) return NOT_SUPPORTED; *whole = cards + 1; return OK; }

static int list(process *found, unsigned n, unsigned *count, process *into) {
    if (*count < n || !into) { *count = n; return n ? TOO_SMALL : OK; }
    for (unsigned i = 0; i < n; i++) { into[i] = found[i]; if (mode("wsl")) into[i].used = ~0ull; }
    *count = n; return OK; }
ANSWER(nvmlDeviceGetComputeRunningProcesses_v3, card *c, unsigned *count, process *into)
    process found[] = {{4200001, number("STAND_IN_OTHERS_MIB", 1024) << 20, 0, 0}, {(unsigned)number("STAND_IN_PID", 0), number("STAND_IN_OWN_MIB", 0) << 20, 0, 0}};
    return list(found, c != cards ? 0 : getenv("STAND_IN_PID") ? 2 : 1, count, into); }
ANSWER(nvmlDeviceGetGraphicsRunningProcesses_v3, card *c, unsigned *count, process *into)
    process found[] = {{4200002, 300ull << 20, 0, 0}};
    return list(found, c == cards, count, into); }
