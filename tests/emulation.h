// CUDA for a C++ compiler: enough of it to run the kernels of headrace_kernels/cuda, every thread of every block, on one CPU thread.
//
// A block's threads are coroutines that run until they stand at a barrier or a shuffle; then the next one runs. The order is forward,
// backward, or shuffled with warps ahead of others, so that a result which depends on it, as where a barrier is missing, shows. A barrier
// that not all reach is a fault, not a hang. What this does not show: real concurrency, memory order, rates, and the instructions that stand behind
// `#ifdef __CUDA_ARCH__`.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define DYNAMIC_SHARED(name) unsigned char* name = emulation::dynamic.data()

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };

namespace emulation {

struct Axes { unsigned x = 0, y = 0, z = 0; };
inline Axes thread, block, threads, blocks;

enum class State { running, at_block_barrier, at_warp_barrier, done };
struct Fibre {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 << 10);
    State state = State::done;
    unsigned char slot[8];    // what it shows the others of its warp in a shuffle
};

inline std::vector<unsigned char> dynamic(64 << 10);
inline std::vector<Fibre> fibres(1024);
inline ucontext_t scheduler;
inline unsigned current = 0;
inline std::string fault;
inline void (*body)(void*) = nullptr;
inline void* body_arguments = nullptr;

inline void enter() {
    body(body_arguments);
    fibres[current].state = State::done;
}

inline void stand(State state) {
    fibres[current].state = state;
    unsigned self = current;
    swapcontext(&fibres[self].context, &scheduler);
}

inline void resume(unsigned index) {
    current = index;
    thread = {index % threads.x, index / threads.x, 0};
    fibres[index].state = State::running;
    swapcontext(&scheduler, &fibres[index].context);
}

// Lets those go on who all stand at the same barrier.
inline void release(unsigned count, std::vector<char>& ready) {
    auto let_go = [&](unsigned first, unsigned last) {
        for (unsigned i = first; i < last; ++i)
            if (fibres[i].state != State::done) {
                fibres[i].state = State::running;
                ready[i] = 1;
            }
    };
    auto stand = [](unsigned first, unsigned last, State state) {
        return std::count_if(fibres.begin() + first, fibres.begin() + last, [state](const Fibre& fibre) { return fibre.state == state; });
    };
    for (unsigned warp = 0; warp < count; warp += 32) {
        unsigned last = std::min(count, warp + 32);
        if (stand(warp, last, State::at_warp_barrier) == last - warp) let_go(warp, last);
    }
    auto arrived = stand(0, count, State::at_block_barrier);
    if (arrived && arrived + stand(0, count, State::done) == count) let_go(0, count);
}

// Runs those that may go on, until each stands at its next barrier. With `shuffle` those of one warp only, and of the same one for as long
// as it can: it runs ahead of the others to the next barrier of the block.
inline void run_ready(unsigned count, std::vector<unsigned>& order, std::vector<char>& ready, std::mt19937* shuffle) {
    static unsigned chosen = 0;
    if (shuffle) {
        std::shuffle(order.begin(), order.end(), *shuffle);
        auto is_ready = [&](unsigned index) { return ready[index] != 0; };
        if (std::none_of(order.begin(), order.end(), [&](unsigned index) { return is_ready(index) && index / 32 == chosen; }))
            chosen = *std::find_if(order.begin(), order.end(), is_ready) / 32;
    }
    for (unsigned index : order) {
        if (!ready[index] || (shuffle && index / 32 != chosen)) continue;
        ready[index] = 0;
        resume(index);
    }
}

inline void run_block(unsigned count, std::vector<unsigned>& order, std::mt19937* shuffle) {
    std::fill(dynamic.begin(), dynamic.end(), 0xA5);
    for (unsigned i = 0; i < count; ++i) {
        getcontext(&fibres[i].context);
        fibres[i].context.uc_stack.ss_sp = fibres[i].stack.data();
        fibres[i].context.uc_stack.ss_size = fibres[i].stack.size();
        fibres[i].context.uc_link = &scheduler;
        fibres[i].state = State::running;
        makecontext(&fibres[i].context, enter, 0);
    }
    std::vector<char> ready(count, 1);
    while (std::find(ready.begin(), ready.end(), 1) != ready.end()) {
        run_ready(count, order, ready, shuffle);
        release(count, ready);
    }
    for (unsigned i = 0; i < count; ++i)
        if (fibres[i].state != State::done) fault = "some threads stand at a barrier that the others do not reach";
}

// order: 0 forward, 1 backward, above that shuffled with the number as seed. Returns what went wrong, or nothing.
inline const char* run(void (*function)(void*), void* arguments, Axes grid, Axes size, unsigned shared, int order) {
    fault.clear();
    body = function;
    body_arguments = arguments;
    blocks = grid;
    threads = size;
    unsigned count = size.x * size.y;
    if (count > fibres.size() || shared > 48u << 10) return "more threads or shared memory than a block may have";
    dynamic.resize(shared);
    std::mt19937 random(order);
    std::vector<unsigned> sequence(count);
    for (unsigned i = 0; i < count; ++i) sequence[i] = order == 1 ? count - 1 - i : i;
    for (unsigned y = 0; y < grid.y && fault.empty(); ++y)
        for (unsigned x = 0; x < grid.x && fault.empty(); ++x) {
            block = {order == 1 ? grid.x - 1 - x : x, order == 1 ? grid.y - 1 - y : y, 0};
            run_block(count, sequence, order > 1 ? &random : nullptr);
        }
    return fault.c_str();
}

template <typename T> T exchange(T value, unsigned with) {
    std::memcpy(fibres[current].slot, &value, sizeof value);
    unsigned other = current / 32 * 32 + with;
    stand(State::at_warp_barrier);
    std::memcpy(&value, fibres[other].slot, sizeof value);
    stand(State::at_warp_barrier);
    return value;
}

template <typename... A, size_t... I> void apply(void (*kernel)(A...), void** values, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(values[I])...);
}
template <auto kernel, typename... A> struct Entry;
template <auto kernel, typename... A> struct Entry<kernel, void (*)(A...)> {
    static void call(void* values) { apply(kernel, static_cast<void**>(values), std::index_sequence_for<A...>()); }
};

}    // namespace emulation

#define threadIdx emulation::thread
#define blockIdx emulation::block
#define blockDim emulation::threads
#define gridDim emulation::blocks

inline void __syncthreads() { emulation::stand(emulation::State::at_block_barrier); }
template <typename T> T __shfl_xor_sync(unsigned, T value, int distance) {
    return emulation::exchange(value, (emulation::current % 32) ^ unsigned(distance));
}

template <typename T> T __ldg(const T* pointer) { return *pointer; }
template <typename To, typename From> To same_bits(From value) {
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}
inline float __uint_as_float(unsigned value) { return same_bits<float>(value); }
inline unsigned __float_as_uint(float value) { return same_bits<unsigned>(value); }
inline int __float_as_int(float value) { return same_bits<int>(value); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    std::uint64_t bytes = std::uint64_t(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
    return result;
}

template <typename T> T atomicAdd(T* place, T value) { return std::exchange(*place, *place + value); }
template <typename T> T atomicMin(T* place, T value) { return std::exchange(*place, std::min(*place, value)); }
template <typename T> T atomicMax(T* place, T value) { return std::exchange(*place, std::max(*place, value)); }

inline float emulated_half_to_float(unsigned short bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                 : exponent     ? std::ldexp(float(fraction + 1024), exponent - 25)
                                : std::ldexp(float(fraction), -24);
    return std::copysign(size, bits & 0x8000 ? -1.0f : 1.0f);
}
inline unsigned short emulated_float_to_half(float value) {
    if (value != value) return 0x7fff;
    unsigned sign = std::signbit(value) ? 0x8000 : 0;
    float size = std::fabs(value);
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size == 0.0f) return sign;
    int exponent = 0;
    std::frexp(size, &exponent);
    // In units of the last place, which below 2^-14 stays what it is there. nearbyint: to the nearest, ties to even.
    int unit = std::max(exponent - 11, -24);
    unsigned count = unsigned(std::nearbyint(std::ldexp(size, -unit)));
    return sign | (unit == -24 ? count : unsigned(unit + 24) * 1024 + count);
}
