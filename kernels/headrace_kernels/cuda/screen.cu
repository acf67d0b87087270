// Non-finite values, minimum, maximum, sum and sum of squares, by feature and by request in one pass. Definition: screen.py.
//
// A warp takes four features a lane (two of int64) and `rows_each` rows, four of them in flight. By feature it keeps sums in registers; the eight warps
// of a block add theirs up in shared memory, then in the result. By request the warp reduces its lanes when the request changes.
// Sums are in fp64: a square of an fp32 number is exact there. Their order is not fixed, so their last bits are not either.
#include "common.cuh"

constexpr int LANES = 32;
constexpr int WARPS = 8;
constexpr int SCREEN_ROWS = 4;   // loads in flight

struct Record { double sum; double squares; float minimum; float maximum; u32 nonfinite; u32 finite; };

DEVICE Record nothing() {
    Record record = {0.0, 0.0, __uint_as_float(0x7f800000u), __uint_as_float(0xff800000u), 0, 0};
    return record;
}

DEVICE void take(Record& record, float value) {
    if (!is_finite(value)) {
        ++record.nonfinite;
        return;
    }
    double wide = value;
    record.sum += wide;
    record.squares += wide * wide;
    record.minimum = fminf(record.minimum, value);
    record.maximum = fmaxf(record.maximum, value);
    ++record.finite;
}

DEVICE void join(Record& record, const Record& other) {
    record.sum += other.sum;
    record.squares += other.squares;
    record.minimum = fminf(record.minimum, other.minimum);
    record.maximum = fmaxf(record.maximum, other.maximum);
    record.nonfinite += other.nonfinite;
    record.finite += other.finite;
}

// Floats of one sign are ordered as their bits are: of equal sign by the signed comparison, against it by the unsigned one.
DEVICE void lower(float* place, float value) {
    if (__float_as_int(value) >= 0) atomicMin(reinterpret_cast<int*>(place), __float_as_int(value));
    else atomicMax(reinterpret_cast<u32*>(place), __float_as_uint(value));
}
DEVICE void raise(float* place, float value) {
    if (__float_as_int(value) >= 0) atomicMax(reinterpret_cast<int*>(place), __float_as_int(value));
    else atomicMin(reinterpret_cast<u32*>(place), __float_as_uint(value));
}

DEVICE void add(Record* place, const Record& record) {
    if (record.nonfinite) atomicAdd(&place->nonfinite, record.nonfinite);
    if (!record.finite) return;
    atomicAdd(&place->sum, record.sum);
    atomicAdd(&place->squares, record.squares);
    lower(&place->minimum, record.minimum);
    raise(&place->maximum, record.maximum);
    atomicAdd(&place->finite, record.finite);
}

DEVICE void add_lanes(Record* place, Record record) {
#pragma unroll
    for (int distance = LANES / 2; distance; distance /= 2) {
        Record other;
        other.sum = __shfl_xor_sync(0xffffffffu, record.sum, distance);
        other.squares = __shfl_xor_sync(0xffffffffu, record.squares, distance);
        other.minimum = __shfl_xor_sync(0xffffffffu, record.minimum, distance);
        other.maximum = __shfl_xor_sync(0xffffffffu, record.maximum, distance);
        other.nonfinite = __shfl_xor_sync(0xffffffffu, record.nonfinite, distance);
        other.finite = __shfl_xor_sync(0xffffffffu, record.finite, distance);
        join(record, other);
    }
    if (threadIdx.x == 0) add(place, record);
}

KERNEL(256, 4) screen_reset(Record* records, i64 count) {
    i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < count) records[at] = nothing();
}

// As load_packs: one branch for all that are whole.
template <typename S, int V>
DEVICE void load_rows(Pack<S, V> (&rows)[SCREEN_ROWS], const S* values, i64 features, i64 left, i64 valid, bool wide) {
    if (wide && valid >= V && left >= SCREEN_ROWS) {
#pragma unroll
        for (int u = 0; u < SCREEN_ROWS; ++u) rows[u] = load_whole<S, V>(values + u * features);
        return;
    }
#pragma unroll
    for (int u = 0; u < SCREEN_ROWS; ++u) rows[u] = load_pack<S, V>(values + u * features, u < left ? valid : 0, wide, S());
}

template <typename S>
DEVICE void screen(const S* values, i64 rows, i64 features, const int* owners, Record* by_feature, Record* by_request, int rows_each) {
    constexpr int V = sizeof(S) == 8 ? 2 : 4;
    i64 feature = ((i64)blockIdx.x * LANES + threadIdx.x) * V;
    i64 valid = larger(0, smaller(V, features - feature));
    i64 first = ((i64)blockIdx.y * WARPS + threadIdx.y) * rows_each;
    i64 last = smaller(rows, first + rows_each);
    bool wide = is_aligned<S, V>(values) && features % V == 0;
    Record mine[V], request = nothing();
#pragma unroll
    for (int i = 0; i < V; ++i) mine[i] = nothing();
    int owner = -1;
    for (i64 row = first; row < last; row += SCREEN_ROWS) {
        Pack<S, V> loaded[SCREEN_ROWS];
        load_rows(loaded, values + row * features + feature, features, last - row, valid, wide);
#pragma unroll
        for (int u = 0; u < SCREEN_ROWS; ++u) {
            int next = row + u < last ? __ldg(owners + row + u) : -1;    // one for the whole warp
            if (next < 0) continue;
            if (by_request && next != owner) {
                if (owner >= 0) add_lanes(by_request + owner, request);
                request = nothing();
            }
            owner = next;
#pragma unroll
            for (int i = 0; i < V; ++i) {
                if (i >= valid) continue;
                Record one = nothing();
                take(one, to_float(loaded[u].items[i]));
                if (by_feature) join(mine[i], one);
                if (by_request) join(request, one);
            }
        }
    }
    if (by_request && owner >= 0) add_lanes(by_request + owner, request);
    if (!by_feature) return;
    __shared__ Record shared[WARPS][LANES * V];
#pragma unroll
    for (int i = 0; i < V; ++i) shared[threadIdx.y][i * LANES + threadIdx.x] = mine[i];
    __syncthreads();
    if (threadIdx.y >= V) return;
    Record all = nothing();
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) join(all, shared[warp][threadIdx.y * LANES + threadIdx.x]);
    if (threadIdx.y < valid) add(by_feature + feature + threadIdx.y, all);
}

#define SCREEN(S, s)                                                                                                                \
    KERNEL(256, 2) screen_##s(const S* values, i64 rows, i64 features, const int* owners, Record* by_feature, Record* by_request,   \
        int rows_each) {                                                                                                            \
        screen<S>(values, rows, features, owners, by_feature, by_request, rows_each);                                               \
    }
SCREEN(float, float32)
SCREEN(half_t, float16)
SCREEN(bfloat_t, bfloat16)
SCREEN(int, int32)
SCREEN(i64, int64)
SCREEN(u8, uint8)
