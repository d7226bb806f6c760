// The memory of the stand-in card: host memory that the operating system provides when it is touched, and an account
// of how much of the card it is. The account is what makes cudaMalloc fail when a real card's would.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "cards.h"

constexpr size_t GRANULARITY = 2 << 20;  // of the card's pages: cudaMalloc and cuMemCreate take whole ones

constexpr size_t round_up(size_t bytes, size_t to = GRANULARITY) { return (bytes + to - 1) / to * to; }

// One lock for everything that is not a counter: a step's launches come from two threads, and none waits long.
extern std::recursive_mutex lock;
using Guard = std::lock_guard<std::recursive_mutex>;

struct Region {
    uint64_t address;
    size_t num_bytes;
    int device;
};

int current_device();
bool set_current_device(int device);  // false for a device that is not there

// Takes a context's memory where the process has none on the device yet; false where there is too little.
bool ensure_context(int device);

size_t free_bytes(int device);
bool take_bytes(int device, size_t num_bytes);  // from the account; false where there are too few
void give_bytes(int device, size_t num_bytes);
void set_memory(size_t total_bytes, size_t context_bytes);

size_t total_bytes();
size_t peak_bytes(int device);

// Address space on a boundary of `alignment`; 0 where the host has none. protection: as for mmap.
uint64_t reserve_addresses(size_t num_bytes, size_t alignment, int protection, int device);
void release_addresses(uint64_t address, size_t num_bytes);
// The region of the card that the address lies in; null for an address of the host.
const Region* find_region(const void* address);

void* allocate_pinned(size_t num_bytes);
void note_pinned(const void* address, size_t num_bytes);
void free_pinned(void* address);
void forget_pinned(const void* address);
bool is_pinned(const void* address);

// Contents. Larger ones than FAKE_COPY_MAX are left as they are: memory does not depend on them, and time does.
void fill_bytes(void* address, int value, size_t num_bytes);
void copy_bytes(void* to, const void* from, size_t num_bytes);
size_t most_copied_bytes();
