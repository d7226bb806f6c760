/* Replays allocations with those rules of rules.py that apply with PyTorch's default settings, on one
   stream.

   tests/allocator/test_plain_replay.py compares it with the allocator that implements all rules. Sizes and
   addresses are counted in units of 512 bytes. A list of free blocks is an array of pointers, sorted by
   size, then by address: traces of 80 layers have some hundred free blocks, for which moving a part of
   the array is cheaper than any tree. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum {
    UNIT_BYTES = 512,
    SMALL = 2048,          /* the largest request of the small pool */
    SMALL_SEGMENT = 4096,
    MIN_LARGE = 20480,     /* from this size on, a request gets a segment of its own */
    LARGE_SEGMENT = 40960,
    ROUND_LARGE = 4096,
};

/* Limit of one request, and of the addresses in use before it, in units. With it no sum below, in units or
   in bytes, can overflow. */
#define MAX_UNITS ((int64_t)1 << 52)

typedef struct Block {
    int64_t address, size;
    /* The neighbours in the segment. For a spare block, `after` is the next spare one. */
    struct Block *before, *after;
    struct Pool *pool;
    bool is_free;
} Block;

typedef struct Pool {
    Block **free;
    Py_ssize_t num_free;
} Pool;

typedef struct {
    Pool small, large;
    Block *fresh; /* the next block that was never used */
    Block *spare; /* blocks that were merged into a neighbour or released */
    int64_t reserved, next_address, limit;
} Allocator;

static Block *
new_block(Allocator *self, Pool *pool, int64_t address, int64_t size)
{
    Block *block = self->spare;
    if (block != NULL)
        self->spare = block->after;
    else
        block = self->fresh++;
    *block = (Block){.address = address, .size = size, .pool = pool};
    return block;
}

static void
drop(Allocator *self, Block *block)
{
    block->after = self->spare;
    self->spare = block;
}

/* Returns the index in free[low..high) at which a block of this size and address is or belongs. */
static Py_ssize_t
find(const Pool *pool, Py_ssize_t low, Py_ssize_t high, int64_t size, int64_t address)
{
    while (low < high) {
        Py_ssize_t middle = low + (high - low) / 2;
        const Block *block = pool->free[middle];
        if (block->size < size || (block->size == size && block->address < address))
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void
move(Pool *pool, Py_ssize_t to, Py_ssize_t from, Py_ssize_t number)
{
    memmove(pool->free + to, pool->free + from, (size_t)number * sizeof *pool->free);
}

/* Moves free[at], whose size has changed, to where it belongs in the order. */
static void
reorder(Pool *pool, Py_ssize_t at)
{
    Block *block = pool->free[at];
    Py_ssize_t to = find(pool, 0, at, block->size, block->address);
    if (to < at) {
        move(pool, to + 1, to, at - to);
    } else {
        to = find(pool, at + 1, pool->num_free, block->size, block->address) - 1;
        move(pool, at, at + 1, to - at);
    }
    pool->free[to] = block;
}

static void
remove_free(Pool *pool, Py_ssize_t at)
{
    pool->num_free--;
    move(pool, at, at + 1, pool->num_free - at);
}

static void
insert_free(Pool *pool, Block *block)
{
    Py_ssize_t at = find(pool, 0, pool->num_free, block->size, block->address);
    block->is_free = true;
    move(pool, at + 1, at, pool->num_free - at);
    pool->free[at] = block;
    pool->num_free++;
}

/* Merges the block after `block` into it. */
static void
merge_next(Allocator *self, Block *block)
{
    Block *next = block->after;
    block->size += next->size;
    block->after = next->after;
    if (block->after != NULL)
        block->after->before = block;
    drop(self, next);
}

static void
release(Allocator *self, Block *block)
{
    Pool *pool = block->pool;
    Block *before = block->before, *after = block->after;
    if (after != NULL && after->is_free) {
        remove_free(pool, find(pool, 0, pool->num_free, after->size, after->address));
        merge_next(self, block);
    }
    if (before != NULL && before->is_free) {
        Py_ssize_t at = find(pool, 0, pool->num_free, before->size, before->address);
        merge_next(self, before);
        reorder(pool, at);
    } else {
        insert_free(pool, block);
    }
}

/* Releases the segments of which every byte is free. */
static void
empty_cache(Allocator *self, Pool *pool)
{
    Py_ssize_t num_remaining = 0;
    for (Py_ssize_t i = 0; i < pool->num_free; i++) {
        Block *block = pool->free[i];
        if (block->before != NULL || block->after != NULL) {
            pool->free[num_remaining++] = block;
        } else {
            self->reserved -= block->size;
            drop(self, block);
        }
    }
    pool->num_free = num_remaining;
}

/* Returns a block of `size` units, or NULL if none is free and the limit allows no new segment. */
static Block *
allocate(Allocator *self, int64_t size, unsigned char *is_retried)
{
    bool is_small = size <= SMALL;
    Pool *pool = is_small ? &self->small : &self->large;
    Py_ssize_t at = find(pool, 0, pool->num_free, size, 0);
    if (at == pool->num_free) {
        int64_t segment = is_small ? SMALL_SEGMENT
                        : size < MIN_LARGE ? LARGE_SEGMENT
                        : (size + ROUND_LARGE - 1) / ROUND_LARGE * ROUND_LARGE;
        if (self->reserved + segment > self->limit) {
            empty_cache(self, &self->small);
            empty_cache(self, &self->large);
            *is_retried = 1;
        }
        if (self->reserved + segment > self->limit)
            return NULL;
        at = pool->num_free; /* no free block is larger */
        insert_free(pool, new_block(self, pool, self->next_address, segment));
        self->reserved += segment;
        self->next_address += segment;
    }
    Block *block = pool->free[at];
    int64_t remaining = block->size - size;
    if (remaining <= (is_small ? 0 : SMALL)) {
        remove_free(pool, at);
        block->is_free = false;
        return block;
    }
    Block *front = new_block(self, pool, block->address, size);
    front->before = block->before;
    front->after = block;
    if (front->before != NULL)
        front->before->after = front;
    block->before = front;
    block->address += size;
    block->size = remaining;
    reorder(pool, at);
    return front;
}

typedef struct {
    Py_ssize_t num_events, num_storages;
    const int64_t *storage, *requested;
    int64_t *allocated_changes, *reserved_bytes;
    unsigned char *is_retried;
} Columns;

/* Returns the number of events replayed: all, or those before the first that failed. Returns -1 if a
   number is out of range. */
static Py_ssize_t
replay_events(Allocator *self, const Columns *columns, Block **block_of)
{
    for (Py_ssize_t i = 0; i < columns->num_events; i++) {
        int64_t storage = columns->storage[i], num_bytes = columns->requested[i];
        if (num_bytes == 0) {
            empty_cache(self, &self->small);
            empty_cache(self, &self->large);
        } else if (storage < 0 || storage >= columns->num_storages) {
            return -1;
        } else if (num_bytes < 0) {
            Block *block = block_of[storage];
            if (block != NULL) {
                columns->allocated_changes[i] = -block->size * UNIT_BYTES;
                release(self, block);
                block_of[storage] = NULL;
            }
        } else {
            int64_t size = (num_bytes - 1) / UNIT_BYTES + 1;
            if (size > MAX_UNITS || self->next_address > MAX_UNITS)
                return -1;
            Block *block = allocate(self, size, &columns->is_retried[i]);
            columns->reserved_bytes[i] = self->reserved * UNIT_BYTES;
            if (block == NULL)
                return i;
            block_of[storage] = block;
            columns->allocated_changes[i] = block->size * UNIT_BYTES;
        }
        columns->reserved_bytes[i] = self->reserved * UNIT_BYTES;
    }
    return columns->num_events;
}

enum { STORAGE, REQUESTED, ALLOCATED_CHANGES, RESERVED_BYTES, IS_RETRIED, NUM_COLUMNS };

static bool
is_column(const Py_buffer *view, Py_ssize_t num_events, size_t item_bytes)
{
    return view->len == num_events * (Py_ssize_t)item_bytes && (uintptr_t)view->buf % item_bytes == 0;
}

/* Returns the number of events replayed, or NULL with an exception set. */
static PyObject *
replay_columns(const Py_buffer *views, Py_ssize_t num_storages, int64_t limit)
{
    Py_ssize_t num_events = views[STORAGE].len / (Py_ssize_t)sizeof(int64_t), num_done = -1;
    for (int i = 0; i < NUM_COLUMNS; i++)
        if (!is_column(&views[i], num_events, i == IS_RETRIED ? 1 : sizeof(int64_t))) {
            PyErr_SetString(PyExc_ValueError, "columns of another length or type");
            return NULL;
        }
    Columns columns = {
        .num_events = num_events,
        .num_storages = num_storages,
        .storage = views[STORAGE].buf,
        .requested = views[REQUESTED].buf,
        .allocated_changes = views[ALLOCATED_CHANGES].buf,
        .reserved_bytes = views[RESERVED_BYTES].buf,
        .is_retried = views[IS_RETRIED].buf,
    };
    /* An allocation makes at most two blocks, its own and the remainder of a segment. Pages that are never
       touched cost no memory, and calloc refuses a product that overflows. */
    size_t max_blocks = 2 * (size_t)num_events;
    Block *blocks = PyMem_RawCalloc(max_blocks, sizeof *blocks);
    Block **small = PyMem_RawCalloc(max_blocks, sizeof *small);
    Block **large = PyMem_RawCalloc(max_blocks, sizeof *large);
    Block **block_of = num_storages < 0 ? NULL : PyMem_RawCalloc((size_t)num_storages, sizeof *block_of);
    if (blocks != NULL && small != NULL && large != NULL && block_of != NULL) {
        Allocator allocator = {.small.free = small, .large.free = large, .fresh = blocks, .limit = limit};
        Py_BEGIN_ALLOW_THREADS
        num_done = replay_events(&allocator, &columns, block_of);
        Py_END_ALLOW_THREADS
        if (num_done < 0)
            PyErr_SetString(PyExc_ValueError, "the events hold a number out of range");
    } else {
        PyErr_NoMemory();
    }
    PyMem_RawFree(blocks);
    PyMem_RawFree(small);
    PyMem_RawFree(large);
    PyMem_RawFree(block_of);
    return num_done < 0 ? NULL : PyLong_FromSsize_t(num_done);
}

static PyObject *
replay(PyObject *Py_UNUSED(module), PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"storage",    "requested",    "allocated_changes", "reserved_bytes",
                            "is_retried", "num_storages", "limit",             NULL};
    Py_buffer views[NUM_COLUMNS];
    Py_ssize_t num_storages;
    long long limit;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "y*y*$w*w*w*nL", names, &views[STORAGE], &views[REQUESTED],
                                     &views[ALLOCATED_CHANGES], &views[RESERVED_BYTES], &views[IS_RETRIED],
                                     &num_storages, &limit))
        return NULL;
    PyObject *num_done = replay_columns(views, num_storages, limit);
    for (int i = 0; i < NUM_COLUMNS; i++)
        PyBuffer_Release(&views[i]);
    return num_done;
}

static PyMethodDef methods[] = {
    {"replay", (PyCFunction)(void (*)(void))replay, METH_VARARGS | METH_KEYWORDS,
     "Return the number of events replayed: all, or those before the first that failed. Fill in "
     "allocated_changes, reserved_bytes and is_retried, which must be zeros before."},
    {NULL, NULL, 0, NULL},
};

/* fast.py compares these with the constants of rules.py. */
static int
add_constants(PyObject *module)
{
    return PyModule_AddIntMacro(module, UNIT_BYTES) || PyModule_AddIntMacro(module, SMALL) ||
                   PyModule_AddIntMacro(module, SMALL_SEGMENT) || PyModule_AddIntMacro(module, MIN_LARGE) ||
                   PyModule_AddIntMacro(module, LARGE_SEGMENT) || PyModule_AddIntMacro(module, ROUND_LARGE)
               ? -1
               : 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)add_constants}, {0, NULL}};

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_fast", .m_methods = methods, .m_slots = slots};

PyMODINIT_FUNC
PyInit__fast(void)
{
    return PyModuleDef_Init(&module);
}
