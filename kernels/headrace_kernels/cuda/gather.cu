// Rows from anywhere in a slab to one batch, cast and padded. Definition: gather.py.
//
// One line of blocks (x) for each row (y). The stores decide the alignment: elements before the first 16-byte boundary of the row's
// place in the batch, and after the last, are moved one by one. Loads are as wide where the row's place in the slab allows it.
#include "common.cuh"

constexpr int GATHER_UNROLL = 4;    // independent loads in flight per thread

// Blocks a multiprocessor: as many as leave each thread the registers it needs. For sm_120 the compiler needs a few more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define GATHER_BLOCKS 2
#else
#define GATHER_BLOCKS 3
#endif

template <typename S, typename T> struct Gather {
    static constexpr int V = 16 / (sizeof(S) > sizeof(T) ? sizeof(S) : sizeof(T));

    static DEVICE void one(const S* from, T* to, T* mask, i64 index, i64 length, T pad) {
        bool there = index < length;
        to[index] = there ? Cast<T>::from(from[index]) : pad;
        if (mask) mask[index] = Cast<T>::from((u8)there);
    }

    static DEVICE void store(const Pack<S, V>& pack, T* to, T* mask, i64 index, i64 length, T pad, bool wide_mask) {
        Pack<T, V> result;
#pragma unroll
        for (int i = 0; i < V; ++i) result.items[i] = index + i < length ? Cast<T>::from(pack.items[i]) : pad;
        store_pack<T, V>(to + index, result, V, true);
        if (!mask) return;
#pragma unroll
        for (int i = 0; i < V; ++i) result.items[i] = Cast<T>::from((u8)(index + i < length));
        store_pack<T, V>(mask + index, result, V, wide_mask);
    }

    static DEVICE void row(const S* from, T* to, T* mask, i64 width, i64 length, T pad) {
        i64 head = (i64)((0 - address_of(to)) & (sizeof(T) * V - 1)) / (i64)sizeof(T);
        head = smaller(head, width);
        i64 packs = (width - head) / V;
        bool wide = is_aligned<S, V>(from + head);
        bool wide_mask = is_aligned<T, V>(mask + head);
        i64 step = (i64)blockDim.x * V, end = head + packs * V;
        i64 first = head + ((i64)blockIdx.x * blockDim.x * GATHER_UNROLL + threadIdx.x) * V;
        Pack<S, V> loaded[GATHER_UNROLL];
        load_packs(loaded, from + first, step, smaller(end, length) - first, wide, S());
#pragma unroll
        for (int u = 0; u < GATHER_UNROLL; ++u)
            if (first + u * step < end) store(loaded[u], to, mask, first + u * step, length, pad, wide_mask);
        if (blockIdx.x) return;
        i64 tail = head + packs * V + threadIdx.x;
        if (threadIdx.x < head) one(from, to, mask, threadIdx.x, length, pad);
        if (tail < width) one(from, to, mask, tail, length, pad);
    }
};

template <typename S, typename T>
DEVICE void gather(const u8* slab, const i64* table, T* into, T* mask, i64 rows, i64 width, u64 pad_bits) {
    union { u64 bits; T value; } pad;
    pad.bits = pad_bits;
    for (i64 row = blockIdx.y; row < rows; row += gridDim.y) {
        const S* from = reinterpret_cast<const S*>(slab + __ldg(table + 2 * row));
        i64 length = larger(0, smaller(width, __ldg(table + 2 * row + 1)));
        Gather<S, T>::row(from, into + row * width, mask ? mask + row * width : mask, width, length, pad.value);
    }
}

#define GATHER(S, s, T, t)                                                                                                          \
    KERNEL(256, GATHER_BLOCKS) gather_##s##_##t(const u8* slab, const i64* table, T* into, T* mask, i64 rows, i64 width, u64 pad_bits) {        \
        gather<S, T>(slab, table, into, mask, rows, width, pad_bits);                                                               \
    }
#define GATHER_TO_ALL(S, s)        \
    GATHER(S, s, float, float32)   \
    GATHER(S, s, half_t, float16)  \
    GATHER(S, s, bfloat_t, bfloat16) \
    GATHER(S, s, int, int32)       \
    GATHER(S, s, i64, int64)       \
    GATHER(S, s, u8, uint8)

GATHER_TO_ALL(float, float32)
GATHER_TO_ALL(half_t, float16)
GATHER_TO_ALL(bfloat_t, bfloat16)
GATHER_TO_ALL(int, int32)
GATHER_TO_ALL(i64, int64)
GATHER_TO_ALL(u8, uint8)
