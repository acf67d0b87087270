// Values counted into ranges, feature by feature. Definition: histogram.py, of the values as fp32; the counts are exactly its.
//
// The values are read as one long line, 16 bytes a load, four loads in flight; the feature of each comes from its place. `shared`: edges
// and counters of all features in shared memory, in several copies so that lanes with equal bins meet in different banks, and added
// to the result once a block. `global`: edges through L1, counters in device memory, for more features or edges than that holds.
#include "common.cuh"

constexpr int HISTOGRAM_THREADS = 256;
constexpr int HISTOGRAM_UNROLL = 4;

// Of each value how many of its `count` ascending edges, from its start on, are less; 0 for NaN. All together: a search is a chain of
// loads that wait for each other.
template <int N, typename Index>
DEVICE void edges_below(const float* edges, const Index (&starts)[N], int count, const float (&values)[N], int (&bins)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) bins[i] = 0;
    for (; count > 1; count -= count / 2) {
        int half = count / 2;
#pragma unroll
        for (int i = 0; i < N; ++i) bins[i] += edges[starts[i] + bins[i] + half - 1] < values[i] ? half : 0;
    }
    if (count < 1) return;
#pragma unroll
    for (int i = 0; i < N; ++i) bins[i] += edges[starts[i] + bins[i]] < values[i] ? 1 : 0;
}

template <typename S, typename Count>
DEVICE void count_values(const S* values, i64 total, int features, const float* edges, int edge_count, Count count) {
    constexpr int V = 16 / sizeof(S), N = V < 4 ? V : 4;
    bool wide = is_aligned<S, V>(values);
    i64 threads = (i64)gridDim.x * HISTOGRAM_THREADS;
    i64 first = ((i64)blockIdx.x * HISTOGRAM_THREADS + threadIdx.x) * V;
    // The one division: from then on the feature is moved along with the place.
    int feature = (int)(first % features);
    int step = (int)(threads * V % features);
    for (i64 at = first; at < total; at += threads * V * HISTOGRAM_UNROLL) {
        Pack<S, V> loaded[HISTOGRAM_UNROLL];
        load_packs(loaded, values + at, threads * V, total - at, wide, S());
#pragma unroll
        for (int u = 0; u < HISTOGRAM_UNROLL; ++u) {
            i64 left = total - (at + u * threads * V);
            int column = feature;
#pragma unroll
            for (int i = 0; i < V; i += N) {
                float numbers[N];
                typename Count::Index starts[N], cells[N];
                int bins[N];
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    numbers[n] = to_float(loaded[u].items[i + n]);
                    starts[n] = (typename Count::Index)column * edge_count;
                    cells[n] = starts[n] + column;
                    column = column + 1 == features ? 0 : column + 1;
                }
                edges_below(edges, starts, edge_count, numbers, bins);
#pragma unroll
                for (int n = 0; n < N; ++n)
                    if (i + n < left && is_finite(numbers[n])) count(cells[n] + bins[n]);
            }
            feature += step;
            feature -= feature >= features ? features : 0;
        }
    }
}

struct CountShared {
    typedef int Index;
    u32* counters;
    int copies;
    DEVICE void operator()(int cell) const { atomicAdd(counters + cell * copies + (threadIdx.x & (copies - 1)), 1u); }
};

struct CountGlobal {
    typedef i64 Index;
    u64* counts;
    DEVICE void operator()(i64 cell) const { atomicAdd(counts + cell, (u64)1); }
};

DEVICE i64 values_to_count(i64 rows, int features, const int* live) { return (live ? smaller(rows, larger(0, *live)) : rows) * features; }

template <typename S>
DEVICE void histogram_shared(const S* values, i64 rows, int features, const float* edges, int edge_count, u64* counts, const int* live,
    int copies) {
    DYNAMIC_SHARED(memory);
    int cells = features * (edge_count + 1);
    CountShared count = {reinterpret_cast<u32*>(memory), copies};
    float* nearby = reinterpret_cast<float*>(count.counters + cells * copies);
    for (int i = threadIdx.x; i < cells * copies; i += HISTOGRAM_THREADS) count.counters[i] = 0;
    for (int i = threadIdx.x; i < features * edge_count; i += HISTOGRAM_THREADS) nearby[i] = __ldg(edges + i);
    __syncthreads();
    count_values(values, values_to_count(rows, features, live), features, nearby, edge_count, count);
    __syncthreads();
    for (int cell = threadIdx.x; cell < cells; cell += HISTOGRAM_THREADS) {
        u64 sum = 0;
        // Each thread begins at another copy: else all lanes would read from one bank.
        for (int i = 0; i < copies; ++i) sum += count.counters[cell * copies + ((i + threadIdx.x) & (copies - 1))];
        if (sum) atomicAdd(counts + cell, sum);
    }
}

#define HISTOGRAM(S, s)                                                                                                             \
    KERNEL(HISTOGRAM_THREADS, 4) histogram_shared_##s(const S* values, i64 rows, int features, const float* edges, int edge_count,  \
        u64* counts, const int* live, int copies) {                                                                                 \
        histogram_shared<S>(values, rows, features, edges, edge_count, counts, live, copies);                                       \
    }                                                                                                                               \
    KERNEL(HISTOGRAM_THREADS, 2) histogram_global_##s(const S* values, i64 rows, int features, const float* edges, int edge_count,  \
        u64* counts, const int* live) {                                                                                             \
        CountGlobal count = {counts};                                                                                               \
        count_values(values, values_to_count(rows, features, live), features, edges, edge_count, count);                            \
    }
HISTOGRAM(float, float32)
HISTOGRAM(half_t, float16)
HISTOGRAM(bfloat_t, bfloat16)
HISTOGRAM(int, int32)
HISTOGRAM(i64, int64)
HISTOGRAM(u8, uint8)
