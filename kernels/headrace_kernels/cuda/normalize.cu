// uint8 images to what a vision model takes. Definition: normalize.py; table: gather.py.
//
// Without a resize a block takes a tile of pixels through shared memory: 16-byte loads of the interleaved bytes, all in flight at
// once, and 16-byte stores of neighbours in one plane. What a thread reads back from shared memory is C words apart from its neighbour's;
// with three channels no two of them are in one bank. With a resize a thread computes one pixel of the result; its taps come through L1.
#include "common.cuh"
#include "resize.cuh"

constexpr int NORMALIZE_THREADS = 128;
constexpr int TILE = 2048;    // pixels

// By the source's channel: a value is byte * factor + term, and goes to plane `reverse` ? C - 1 - channel : channel.
struct Channels { float factor[4]; float term[4]; };

// A byte as fp32, exactly, without the conversion instruction, which has a fraction of the rate of these: 2^23 + byte - 2^23.
DEVICE float byte_to_float(u32 word, int index) { return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + index)) - 8388608.0f; }

DEVICE void pack_pair(float low, float high, Pack<float, 4>& pack, int at) {
    pack.items[at] = low;
    pack.items[at + 1] = high;
}
DEVICE void pack_pair(float low, float high, Pack<half_t, 8>& pack, int at) {
    pack.items[at] = to_half(low);
    pack.items[at + 1] = to_half(high);
}
DEVICE void pack_pair(float low, float high, Pack<bfloat_t, 8>& pack, int at) {
    pack.items[at] = to_bfloat(low);
    pack.items[at + 1] = to_bfloat(high);
}

template <int C> DEVICE void stage(const u8* from, u8* tile, int bytes) {
    constexpr int LOADS = TILE * C / 16 / NORMALIZE_THREADS;
    int done = 0;
    if (is_aligned<u8, 16>(from)) {
        uint4 loaded[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            int at = (i * NORMALIZE_THREADS + threadIdx.x) * 16;
            if (at + 16 <= bytes) loaded[i] = __ldg(reinterpret_cast<const uint4*>(from + at));
        }
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            int at = (i * NORMALIZE_THREADS + threadIdx.x) * 16;
            if (at + 16 <= bytes) *reinterpret_cast<uint4*>(tile + at) = loaded[i];
        }
        done = bytes & ~15;
    }
#pragma unroll 8
    for (int at = done + threadIdx.x; at < bytes; at += NORMALIZE_THREADS) tile[at] = __ldg(from + at);
}

template <typename T, int C> DEVICE void write_planes(const u8* tile, T* into, i64 pixels, int count, const Channels& with, bool reverse) {
    constexpr int V = 16 / sizeof(T);
    typedef typename Word<V>::type Part;    // V bytes: C of them are V pixels
    bool wide = is_aligned<T, V>(into) && pixels % V == 0;
    for (int at = threadIdx.x * V; at < count; at += NORMALIZE_THREADS * V) {
        union { Part parts[C]; u32 words[V * C / 4]; } read;
#pragma unroll
        for (int i = 0; i < C; ++i) read.parts[i] = reinterpret_cast<const Part*>(tile + at * C)[i];
#pragma unroll
        for (int channel = 0; channel < C; ++channel) {
            Pack<T, V> pack;
#pragma unroll
            for (int i = 0; i < V; i += 2) {
                int low = i * C + channel, high = (i + 1) * C + channel;
                pack_pair(fmaf(byte_to_float(read.words[low / 4], low % 4), with.factor[channel], with.term[channel]),
                          fmaf(byte_to_float(read.words[high / 4], high % 4), with.factor[channel], with.term[channel]), pack, i);
            }
            store_pack<T, V>(into + (reverse ? C - 1 - channel : channel) * pixels + at, pack, count - at, wide);
        }
    }
}

template <typename T, int C> DEVICE void write_interleaved(const u8* tile, T* into, int count, const Channels& with, bool reverse) {
    constexpr int V = 16 / sizeof(T);
    bool wide = is_aligned<T, V>(into);
    int elements = count * C;
    for (int at = threadIdx.x * V; at < elements; at += NORMALIZE_THREADS * V) {
        Pack<T, V> pack;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            int pixel = (at + i) / C, channel = (at + i) % C, source = reverse ? C - 1 - channel : channel;
            float factor = with.factor[0], term = with.term[0];
#pragma unroll
            for (int c = 1; c < C; ++c) {
                factor = source == c ? with.factor[c] : factor;
                term = source == c ? with.term[c] : term;
            }
            pack.items[i] = Cast<T>::from(fmaf((float)tile[pixel * C + source], factor, term));
        }
        store_pack<T, V>(into + at, pack, elements - at, wide);
    }
}

template <typename T, int C, bool PLANES>
DEVICE void normalize(const u8* images, const i64* table, T* into, i64 rows, i64 pixels, const Channels& with, bool reverse) {
    __shared__ __align__(16) u8 tile[TILE * C];
    i64 start = (i64)blockIdx.x * TILE;
    int count = (int)smaller(TILE, pixels - start);
    for (i64 row = blockIdx.y; row < rows; row += gridDim.y) {
        const u8* image = images + (table ? __ldg(table + 2 * row) : row * pixels * C);
        __syncthreads();    // the tile of the row before has been read
        stage<C>(image + start * C, tile, count * C);
        __syncthreads();
        if (PLANES) write_planes<T, C>(tile, into + row * pixels * C + start, pixels, count, with, reverse);
        else write_interleaved<T, C>(tile, into + (row * pixels + start) * C, count, with, reverse);
    }
}

struct Resize { int height, width, from_height, from_width, antialias; };

template <typename T, int C, bool PLANES>
DEVICE void resize(const u8* images, const i64* table, T* into, i64 rows, const Resize& size, const Channels& with, bool reverse) {
    i64 pixels = (i64)size.height * size.width;
    i64 pixel = (i64)blockIdx.x * NORMALIZE_THREADS + threadIdx.x;
    if (pixel >= pixels) return;
    Span down = span((int)(pixel / size.width), size.height, size.from_height, size.antialias);
    Span across = span((int)(pixel % size.width), size.width, size.from_width, size.antialias);
    float norm = 1.0f / (total(down) * total(across));
    for (i64 row = blockIdx.y; row < rows; row += gridDim.y) {
        const u8* image = images + (table ? __ldg(table + 2 * row) : row * size.from_height * size.from_width * C);
        float sums[C];
#pragma unroll
        for (int channel = 0; channel < C; ++channel) sums[channel] = 0;
        for (int y = 0; y < down.count; ++y) {
            const u8* line = image + ((i64)(down.first + y) * size.from_width + across.first) * C;
            float line_weight = weight(down, y) * norm;
            for (int x = 0; x < across.count; ++x) {
                float tap = line_weight * weight(across, x);
#pragma unroll
                for (int channel = 0; channel < C; ++channel) sums[channel] = fmaf(tap, (float)__ldg(line + x * C + channel), sums[channel]);
            }
        }
#pragma unroll
        for (int channel = 0; channel < C; ++channel) {
            int target = reverse ? C - 1 - channel : channel;
            i64 at = PLANES ? target * pixels + pixel : pixel * C + target;
            into[row * pixels * C + at] = Cast<T>::from(fmaf(sums[channel], with.factor[channel], with.term[channel]));
        }
    }
}

#define NORMALIZE(layout, PLANES, T, t, C)                                                                                          \
    KERNEL(NORMALIZE_THREADS, 8) normalize_##layout##_##t##_##C(const u8* images, const i64* table, T* into, i64 rows, i64 pixels,  \
        float f0, float f1, float f2, float f3, float t0, float t1, float t2, float t3, int reverse) {                             \
        Channels with = {{f0, f1, f2, f3}, {t0, t1, t2, t3}};                                                                       \
        normalize<T, C, PLANES>(images, table, into, rows, pixels, with, reverse != 0);                                             \
    }                                                                                                                               \
    KERNEL(NORMALIZE_THREADS, 8) resize_##layout##_##t##_##C(const u8* images, const i64* table, T* into, i64 rows, int height,     \
        int width, int from_height, int from_width, int antialias, float f0, float f1, float f2, float f3, float t0, float t1,      \
        float t2, float t3, int reverse) {                                                                                          \
        Channels with = {{f0, f1, f2, f3}, {t0, t1, t2, t3}};                                                                       \
        Resize size = {height, width, from_height, from_width, antialias};                                                          \
        resize<T, C, PLANES>(images, table, into, rows, size, with, reverse != 0);                                                  \
    }
#define NORMALIZE_CHANNELS(layout, PLANES, T, t) \
    NORMALIZE(layout, PLANES, T, t, 1)           \
    NORMALIZE(layout, PLANES, T, t, 3)           \
    NORMALIZE(layout, PLANES, T, t, 4)
#define NORMALIZE_TYPES(layout, PLANES)                    \
    NORMALIZE_CHANNELS(layout, PLANES, float, float32)     \
    NORMALIZE_CHANNELS(layout, PLANES, half_t, float16)    \
    NORMALIZE_CHANNELS(layout, PLANES, bfloat_t, bfloat16)

NORMALIZE_TYPES(nchw, true)
NORMALIZE_TYPES(nhwc, false)
