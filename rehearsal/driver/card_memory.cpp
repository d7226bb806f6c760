#include "card_memory.h"

#include <sys/mman.h>
#include <unistd.h>
#include <algorithm>
#include <cstring>
#include <iterator>
#include <map>

#include "processes.h"

std::recursive_mutex lock;

namespace {

constexpr size_t PAGE = 4096;
constexpr size_t MOST_TOUCHED = 1 << 20;  // a larger region is cleared by giving its pages back

struct Account {
    int num_cards = number_of_cards();
    size_t total_bytes = memory_of_card();
    size_t context_bytes = number_from_environment("FAKE_CTX_BYTES", 312 << 20);
    size_t most_copied_bytes = number_from_environment("FAKE_COPY_MAX", SIZE_MAX);
    size_t used_bytes[MOST_CARDS] = {};
    size_t peak_bytes[MOST_CARDS] = {};
    bool has_context[MOST_CARDS] = {};
    std::map<uint64_t, Region> regions, pinned;
    ProcessTable* table = open_process_table();
    ProcessSlot* slot = nullptr;
    int pid = 0;  // whose slot it is: after a fork the child takes one of its own
};

// Never destroyed: PyTorch frees memory from destructors that run after this library's.
Account& account() {
    static Account* only = new Account;
    return *only;
}

thread_local int device_of_thread = 0;

void tell_others(int device) {
    Account& mine = account();
    if (!mine.table) return;
    if (mine.pid != getpid()) {
        mine.pid = getpid();
        mine.slot = take_slot(*mine.table, mine.pid);
    }
    if (mine.slot) mine.slot->used_bytes[device] = mine.used_bytes[device];
}

size_t bytes_of_others(int device) {
    Account& mine = account();
    return mine.table ? used_by_others(*mine.table, getpid(), device) : 0;
}

void* map_pages(size_t num_bytes, int protection) {
    void* mapped = mmap(nullptr, num_bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return mapped == MAP_FAILED ? nullptr : mapped;
}

const Region* find_in(const std::map<uint64_t, Region>& regions, const void* address) {
    auto wanted = reinterpret_cast<uint64_t>(address);
    auto after = regions.upper_bound(wanted);
    if (after == regions.begin()) return nullptr;
    const Region& before = std::prev(after)->second;
    return wanted < before.address + before.num_bytes ? &before : nullptr;
}

}  // namespace

int current_device() { return device_of_thread; }

bool set_current_device(int device) {
    if (device < 0 || device >= account().num_cards) return false;
    device_of_thread = device;
    return true;
}

bool ensure_context(int device) {
    Guard guard(lock);
    Account& mine = account();
    if (device < 0 || device >= mine.num_cards) return false;
    if (!mine.has_context[device]) mine.has_context[device] = take_bytes(device, mine.context_bytes);
    return mine.has_context[device];
}

size_t free_bytes(int device) {
    Guard guard(lock);
    size_t used = account().used_bytes[device] + bytes_of_others(device);
    return used >= account().total_bytes ? 0 : account().total_bytes - used;
}

bool take_bytes(int device, size_t num_bytes) {
    Guard guard(lock);
    if (num_bytes > free_bytes(device)) return false;
    Account& mine = account();
    mine.used_bytes[device] += num_bytes;
    mine.peak_bytes[device] = std::max(mine.peak_bytes[device], mine.used_bytes[device]);
    tell_others(device);
    return true;
}

void give_bytes(int device, size_t num_bytes) {
    Guard guard(lock);
    account().used_bytes[device] -= num_bytes;
    tell_others(device);
}

void set_memory(size_t total_bytes, size_t context_bytes) {
    Guard guard(lock);
    account().total_bytes = total_bytes;
    account().context_bytes = context_bytes;
}

size_t total_bytes() { return account().total_bytes; }

size_t peak_bytes(int device) { return account().peak_bytes[device]; }

uint64_t reserve_addresses(size_t num_bytes, size_t alignment, int protection, int device) {
    Guard guard(lock);
    alignment = std::max(alignment, GRANULARITY);
    auto mapped = reinterpret_cast<uint64_t>(map_pages(num_bytes + alignment, protection));
    if (!mapped) return 0;
    // mmap aligns to pages of the host: what stands before and behind the aligned part is given back
    uint64_t aligned = round_up(mapped, alignment);
    if (aligned > mapped) munmap(reinterpret_cast<void*>(mapped), aligned - mapped);
    if (size_t behind = mapped + alignment - aligned) munmap(reinterpret_cast<void*>(aligned + num_bytes), behind);
    account().regions[aligned] = {aligned, num_bytes, device};
    return aligned;
}

void release_addresses(uint64_t address, size_t num_bytes) {
    Guard guard(lock);
    munmap(reinterpret_cast<void*>(address), num_bytes);
    account().regions.erase(address);
}

const Region* find_region(const void* address) {
    Guard guard(lock);
    return find_in(account().regions, address);
}

void* allocate_pinned(size_t num_bytes) {
    void* mapped = map_pages(round_up(num_bytes, PAGE), PROT_READ | PROT_WRITE);
    if (mapped) note_pinned(mapped, round_up(num_bytes, PAGE));
    return mapped;
}

void note_pinned(const void* address, size_t num_bytes) {
    Guard guard(lock);
    auto key = reinterpret_cast<uint64_t>(address);
    account().pinned[key] = {key, num_bytes, 0};
}

void free_pinned(void* address) {
    Guard guard(lock);
    auto found = account().pinned.find(reinterpret_cast<uint64_t>(address));
    if (found == account().pinned.end()) return;
    munmap(address, found->second.num_bytes);
    account().pinned.erase(found);
}

void forget_pinned(const void* address) {
    Guard guard(lock);
    account().pinned.erase(reinterpret_cast<uint64_t>(address));
}

bool is_pinned(const void* address) {
    Guard guard(lock);
    return find_in(account().pinned, address) != nullptr;
}

size_t most_copied_bytes() { return account().most_copied_bytes; }

void fill_bytes(void* address, int value, size_t num_bytes) {
    if (num_bytes > most_copied_bytes()) return;
    if (value == 0 && num_bytes >= MOST_TOUCHED) {
        auto begin = reinterpret_cast<uint64_t>(address), end = begin + num_bytes;
        uint64_t first_page = round_up(begin, PAGE), last_page = end / PAGE * PAGE;
        if (madvise(reinterpret_cast<void*>(first_page), last_page - first_page, MADV_DONTNEED) == 0) {
            memset(address, 0, first_page - begin);
            memset(reinterpret_cast<void*>(last_page), 0, end - last_page);
            return;
        }
    }
    memset(address, value, num_bytes);
}

void copy_bytes(void* to, const void* from, size_t num_bytes) {
    if (num_bytes <= most_copied_bytes()) memmove(to, from, num_bytes);
}
