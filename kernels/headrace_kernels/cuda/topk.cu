// The k largest of each row, and softmax. Definitions: topk.py.
//
// A value and its class are one number, larger for what comes first, so that a maximum of those is a rank with its rule for ties. Each
// thread keeps the largest of its own classes that is not taken yet; a rank is then the maximum over threads, and only the classes
// of the thread that had it are looked at again. `warp`: one warp a row, for few classes. `block`: one block a row; the block looks
// at the winner's classes together.
#include "common.cuh"

constexpr int TEAM = 256;          // threads of a row in `block`
constexpr int ROWS_A_BLOCK = 4;    // in `warp`
constexpr u32 ALL = 0xffffffffu;

// 0 for NaN, which comes last; ascending with the value; the same for 0.0 and -0.0.
DEVICE u32 order(float value) {
    if (value != value) return 0;
    u32 bits = __float_as_uint(value + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
// Never 0. Of equal values the lower class is the larger key.
DEVICE u64 key_of(float value, u32 index) { return (u64)order(value) << 32 | (u32)~index; }
DEVICE u32 class_of(u64 key) { return ~(u32)key; }

struct Larger {
    DEVICE u64 operator()(u64 a, u64 b) const { return a > b ? a : b; }
    DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Plus {
    DEVICE float operator()(float a, float b) const { return a + b; }
};

// The threads that share a row. `reduce` gives all of them the same result.
struct Warp {
    static constexpr int THREADS = 32;
    static DEVICE u32 thread() { return threadIdx.x & 31; }
    static DEVICE i64 row() { return (i64)blockIdx.x * ROWS_A_BLOCK + threadIdx.x / 32; }
    template <typename T, typename F> static DEVICE T reduce(T value, F f) {
#pragma unroll
        for (int distance = 16; distance; distance /= 2) value = f(value, __shfl_xor_sync(ALL, value, distance));
        return value;
    }
};

struct Block {
    static constexpr int THREADS = TEAM;
    static DEVICE u32 thread() { return threadIdx.x; }
    static DEVICE i64 row() { return blockIdx.x; }
    template <typename T, typename F> static DEVICE T reduce(T value, F f) {
        __shared__ T parts[TEAM / 32];
        value = Warp::reduce(value, f);
        if ((threadIdx.x & 31) == 0) parts[threadIdx.x / 32] = value;
        __syncthreads();
        value = parts[0];
#pragma unroll
        for (int i = 1; i < TEAM / 32; ++i) value = f(value, parts[i]);
        __syncthreads();    // before the next one writes
        return value;
    }
};

// exp(value - top) / sum is the softmax. NaN anywhere, an infinity at the top or a row of -inf make the sum NaN, as they do in numpy.
struct Exponentials { float top; float sum; };

template <typename Team, typename S> DEVICE Exponentials exponentials(const S* row, u32 classes) {
    float top = __uint_as_float(0xff800000u), sum = 0;
#pragma unroll 4
    for (u32 i = Team::thread(); i < classes; i += Team::THREADS) top = fmaxf(top, to_float(row[i]));
    top = Team::reduce(top, Larger());
#pragma unroll 4
    for (u32 i = Team::thread(); i < classes; i += Team::THREADS) sum += expf(to_float(row[i]) - top);
    Exponentials result = {top, Team::reduce(sum, Plus())};
    return result;
}

template <typename Team, typename S> DEVICE void softmax(const S* scores, float* into, i64 rows, u32 classes) {
    i64 at = Team::row();
    if (at >= rows) return;    // all of the team, or none
    const S* row = scores + at * classes;
    Exponentials all = exponentials<Team>(row, classes);
#pragma unroll 4
    for (u32 i = Team::thread(); i < classes; i += Team::THREADS)
        into[at * classes + i] = expf(to_float(row[i]) - all.top) / all.sum;
}

// The largest key below `bound` among the classes first, first + step, ...
template <typename S> DEVICE u64 largest(const S* row, u32 classes, u32 first, u32 step, u64 bound) {
    u64 best = 0;
#pragma unroll 4
    for (u32 i = first; i < classes; i += step) {
        u64 key = key_of(to_float(row[i]), i);
        best = key < bound && key > best ? key : best;
    }
    return best;
}

template <typename S> DEVICE u64 next_best(Warp, const S* row, u32 classes, u64 best, u64 taken) {
    return class_of(taken) % Warp::THREADS == Warp::thread() ? largest(row, classes, Warp::thread(), Warp::THREADS, taken) : best;
}
template <typename S> DEVICE u64 next_best(Block, const S* row, u32 classes, u64 best, u64 taken) {
    u32 winner = class_of(taken) % TEAM;
    u64 next = Block::reduce(largest(row, classes, winner + TEAM * Block::thread(), TEAM * TEAM, taken), Larger());
    return winner == Block::thread() ? next : best;
}

template <typename Team, typename S>
DEVICE void topk(const S* scores, float* values, int* indices, i64 rows, u32 classes, u32 k, bool with_softmax) {
    i64 at = Team::row();
    if (at >= rows) return;
    const S* row = scores + at * classes;
    Exponentials all = {0, 1};
    if (with_softmax) all = exponentials<Team>(row, classes);
    u64 best = largest(row, classes, Team::thread(), Team::THREADS, ~(u64)0);
    for (u32 rank = 0; rank < k; ++rank) {
        u64 taken = Team::reduce(best, Larger());
        if (Team::thread() == 0) {
            float value = to_float(row[class_of(taken)]);
            values[at * k + rank] = with_softmax ? expf(value - all.top) / all.sum : value;
            indices[at * k + rank] = (int)class_of(taken);
        }
        if (rank + 1 < k) best = next_best(Team(), row, classes, best, taken);
    }
}

#define TOPK(team, Team, threads, blocks, S, s)                                                                                     \
    KERNEL(threads, blocks) softmax_##team##_##s(const S* scores, float* into, i64 rows, u32 classes) {                             \
        softmax<Team, S>(scores, into, rows, classes);                                                                              \
    }                                                                                                                               \
    KERNEL(threads, blocks) topk_##team##_##s(const S* scores, float* values, int* indices, i64 rows, u32 classes, u32 k,           \
        int with_softmax) {                                                                                                         \
        topk<Team, S>(scores, values, indices, rows, classes, k, with_softmax != 0);                                                \
    }
#define TOPK_TEAMS(S, s)                          \
    TOPK(warp, Warp, 32 * ROWS_A_BLOCK, 8, S, s)  \
    TOPK(block, Block, TEAM, 4, S, s)
TOPK_TEAMS(float, float32)
TOPK_TEAMS(half_t, float16)
TOPK_TEAMS(bfloat_t, bfloat16)
