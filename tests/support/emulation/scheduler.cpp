// SPDX-License-Identifier: Apache-2.0
// The threads of a block, as fibers of one thread of the CPU. With EMULATION_TSAN each is a thread to ThreadSanitizer,
// and nothing but the barriers orders what they do.
#include <cuda_runtime_api.h>

#include <deque>
#include <map>

#ifdef EMULATION_TSAN
#include <sanitizer/tsan_interface.h>
#endif

// Keeps the caller's registers on its stack, whose pointer goes to *from, and goes on where `to` was kept. What the
// system has for this asks the kernel each time, and is a hundred times slower.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.type emulation_switch, @function
emulation_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
.size emulation_switch, . - emulation_switch
)");

namespace emulation {
namespace {

constexpr size_t kStack = size_t{256} << 10;

Thread* current = nullptr;
std::deque<Thread*> ready;  // those that wait for nothing
const std::function<void()>* body = nullptr;
void* scheduler_stack = nullptr;
void* scheduler_fiber = nullptr;

void enter(void* fiber) {
#ifdef EMULATION_TSAN
    __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
#endif
}
void release(void* p) {
#ifdef EMULATION_TSAN
    __tsan_release(p);
#endif
}
void acquire(void* p) {
#ifdef EMULATION_TSAN
    __tsan_acquire(p);
#endif
}

// Lets others run; the caller goes on when it is in `ready` again and its turn has come.
void leave() {
    Thread& thread = *current;
    enter(scheduler_fiber);
    emulation_switch(&thread.stack_pointer, scheduler_stack);
}

void start() {
    Thread& thread = *current;
    acquire(thread.block);
    (*body)();
    release(thread.block);
    current = nullptr;  // has ended
    enter(scheduler_fiber);
    emulation_switch(&thread.stack_pointer, scheduler_stack);
}

void* first_stack_pointer(unsigned char* top) {
    auto** sp = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) / 16 * 16);
    *--sp = nullptr;  // where start() would return to
    *--sp = reinterpret_cast<void*>(&start);
    for (int i = 0; i < 6; ++i) *--sp = nullptr;
    return sp;
}

struct MBarrier {
    int arrivals, left;  // of a phase; still to come
    int64_t bytes;       // that loads still have to bring
    unsigned phase;
    std::vector<Thread*> waiting = {};  // for the end of the phase
    bool seen = true;                   // that of the last one, by some thread that waited for it
};
std::map<uint32_t, MBarrier> mbarriers;
const char* first_fault = nullptr;

}  // namespace

Thread& self() { return *current; }

const unsigned char* place_in_library() {
    static unsigned char place;
    return &place;
}

void fail(const char* what) {
    if (first_fault == nullptr) first_fault = what;
}
const char* fault() { return first_fault; }
void forget_faults() { first_fault = nullptr; }

void wait(Barrier& barrier) {
    release(&barrier);
    if (barrier.waiting.size() + 1 < barrier.count) {
        barrier.waiting.push_back(current);
        leave();
    } else {
        ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
        barrier.waiting.clear();
    }
    acquire(&barrier);
}

bool run(Block& block, dim3 dim, const std::function<void()>& kernel) {
    static std::vector<std::unique_ptr<unsigned char[]>> stacks;
    static std::vector<void*> fibers;  // made once: it takes ThreadSanitizer a millisecond
    const unsigned count = dim.x * dim.y * dim.z;
    std::vector<std::unique_ptr<Thread>> threads;
    body = &kernel;
    ready.clear();
    for (unsigned t = 0; t < count; ++t) {
        threads.push_back(std::make_unique<Thread>());
        Thread& thread = *threads.back();
        thread.index = {t % dim.x, t / dim.x % dim.y, t / (dim.x * dim.y)};
        thread.lane = t % 32, thread.block = &block, thread.warp = block.warps[t / 32].get();
        if (stacks.size() == t) stacks.emplace_back(new unsigned char[kStack]);
        thread.stack_pointer = first_stack_pointer(stacks[t].get() + kStack);
#ifdef EMULATION_TSAN
        if (fibers.size() == t) fibers.push_back(__tsan_create_fiber(0));
        thread.fiber = fibers[t];
        scheduler_fiber = __tsan_get_current_fiber();
#endif
        ready.push_back(&thread);
    }
    release(&block);
    unsigned ended = 0;
    while (!ready.empty()) {
        current = ready.front();
        ready.pop_front();
        Thread& next = *current;
        enter(next.fiber);
        emulation_switch(&scheduler_stack, next.stack_pointer);
        ended += current == nullptr;
    }
    acquire(&block);
    return ended == count;
}

void init_mbarrier(uint32_t address, int arrivals) { mbarriers[address] = {arrivals, arrivals, 0, 0}; }

void change_mbarrier(uint32_t address, int arrivals, int64_t bytes) {
    MBarrier& barrier = mbarriers.at(address);
    release(&barrier);
    if (!barrier.seen) fail("an arrival at an mbarrier whose last phase nobody has waited for");
    barrier.left -= arrivals, barrier.bytes += bytes;
    if (barrier.left > 0 || barrier.bytes > 0) return;
    barrier.seen = !barrier.waiting.empty();
    ++barrier.phase, barrier.left = barrier.arrivals;
    ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
}

void wait_mbarrier(uint32_t address, uint32_t parity) {
    MBarrier& barrier = mbarriers.at(address);
    while ((barrier.phase & 1) == parity) {
        barrier.waiting.push_back(current);
        leave();
    }
    barrier.seen = true;
    acquire(&barrier);
}

}  // namespace emulation
