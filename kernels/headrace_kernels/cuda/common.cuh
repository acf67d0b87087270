// What all kernels share: element types, casts, wide loads and stores. No header of CUDA or of the standard library is included, so
// that NVRTC, which has none at hand, compiles the same text as nvcc; and nothing here is for a GPU alone, so that a C++ compiler with
// the few names of tests/emulation does too.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)

struct half_t { u16 bits; };      // IEEE binary16
struct bfloat_t { u16 bits; };    // the upper half of binary32

// Shared memory whose size the launch gives.
#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) u8 name[]
#endif

DEVICE u64 address_of(const void* pointer) { return (u64)pointer; }

// ---- casts. Numbers become 16-bit floats by way of fp32; to integers they are cut toward zero and saturate, NaN is 0; integers wrap.

DEVICE float to_float(float value) { return value; }
DEVICE float to_float(int value) { return (float)value; }
DEVICE float to_float(i64 value) { return (float)value; }
DEVICE float to_float(u8 value) { return (float)value; }
DEVICE float to_float(bfloat_t value) { return __uint_as_float((u32)value.bits << 16); }
DEVICE float to_float(half_t value) {
#ifdef __CUDA_ARCH__
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    return emulated_half_to_float(value.bits);
#endif
}

DEVICE bool is_finite(float value) { return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u; }

DEVICE half_t to_half(float value) {
    half_t result;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
    result.bits = emulated_float_to_half(value);
#endif
    return result;
}

DEVICE bfloat_t to_bfloat(float value) {
    bfloat_t result;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
    u32 bits = __float_as_uint(value);
    result.bits = value != value ? 0x7fff : (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
    return result;
}

template <typename T> struct Cast;
template <> struct Cast<float> {
    template <typename S> static DEVICE float from(S value) { return to_float(value); }
};
template <> struct Cast<half_t> {
    template <typename S> static DEVICE half_t from(S value) { return to_half(to_float(value)); }
    static DEVICE half_t from(half_t value) { return value; }
};
template <> struct Cast<bfloat_t> {
    template <typename S> static DEVICE bfloat_t from(S value) { return to_bfloat(to_float(value)); }
    static DEVICE bfloat_t from(bfloat_t value) { return value; }
};

// The bounds are fp32 numbers: 2^63 and 2^31 themselves do not fit any more.
DEVICE i64 cut_to_long(float value) {
    if (value != value) return 0;
    if (value >= 9223372036854775808.0f) return 0x7fffffffffffffffLL;
    if (value <= -9223372036854775808.0f) return -0x7fffffffffffffffLL - 1;
    return (i64)value;
}
DEVICE int cut_to_int(float value) {
    if (value != value) return 0;
    if (value >= 2147483648.0f) return 0x7fffffff;
    if (value <= -2147483648.0f) return -0x7fffffff - 1;
    return (int)value;
}
DEVICE u8 cut_to_byte(float value) { return value >= 255.0f ? 255 : (value > 0.0f ? (u8)value : 0); }

template <> struct Cast<i64> {
    template <typename S> static DEVICE i64 from(S value) { return cut_to_long(to_float(value)); }
    static DEVICE i64 from(i64 value) { return value; }
    static DEVICE i64 from(int value) { return value; }
    static DEVICE i64 from(u8 value) { return value; }
};
template <> struct Cast<int> {
    template <typename S> static DEVICE int from(S value) { return cut_to_int(to_float(value)); }
    static DEVICE int from(i64 value) { return (int)(u32)(u64)value; }
    static DEVICE int from(int value) { return value; }
    static DEVICE int from(u8 value) { return value; }
};
template <> struct Cast<u8> {
    template <typename S> static DEVICE u8 from(S value) { return cut_to_byte(to_float(value)); }
    static DEVICE u8 from(i64 value) { return (u8)(u64)value; }
    static DEVICE u8 from(int value) { return (u8)(u32)value; }
    static DEVICE u8 from(u8 value) { return value; }
};

// ---- V elements that are loaded and stored as one word of up to 16 bytes.

template <int BYTES> struct Word;
template <> struct Word<16> { typedef uint4 type; };
template <> struct Word<8> { typedef uint2 type; };
template <> struct Word<4> { typedef u32 type; };
template <> struct Word<2> { typedef u16 type; };
template <> struct Word<1> { typedef u8 type; };

template <typename T, int V> union Pack {
    typedef typename Word<sizeof(T) * V>::type Whole;
    Whole whole;
    T items[V];
};

template <typename T, int V> DEVICE bool is_aligned(const T* pointer) { return (address_of(pointer) & (sizeof(T) * V - 1)) == 0; }

template <typename T, int V> DEVICE Pack<T, V> load_whole(const T* pointer) {
    Pack<T, V> pack;
    pack.whole = __ldg(reinterpret_cast<const typename Pack<T, V>::Whole*>(pointer));
    return pack;
}

// `valid`: how many of the V are there to be read; the rest is `fill`. `wide`: the caller knows the pointer to be aligned.
template <typename T, int V> DEVICE Pack<T, V> load_pack(const T* pointer, i64 valid, bool wide, T fill) {
    if (wide && valid >= V) return load_whole<T, V>(pointer);
    Pack<T, V> pack;
#pragma unroll
    for (int i = 0; i < V; ++i) pack.items[i] = i < valid ? pointer[i] : fill;
    return pack;
}

// One instruction for one word. Left to itself the compiler, which sees through the union, stores its items one by one.
template <typename W> DEVICE void store_word(W* pointer, const W& word) { *pointer = word; }
#ifdef __CUDA_ARCH__
DEVICE void store_word(uint4* pointer, const uint4& word) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(pointer)), "r"(word.x), "r"(word.y),
                 "r"(word.z), "r"(word.w) : "memory");
}
DEVICE void store_word(uint2* pointer, const uint2& word) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(pointer)), "r"(word.x), "r"(word.y) : "memory");
}
DEVICE void store_word(u32* pointer, const u32& word) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(pointer)), "r"(word) : "memory");
}
#endif

template <typename T, int V> DEVICE void store_pack(T* pointer, const Pack<T, V>& pack, i64 valid, bool wide) {
    if (wide && valid >= V) {
        store_word(reinterpret_cast<typename Pack<T, V>::Whole*>(pointer), pack.whole);
        return;
    }
#pragma unroll
    for (int i = 0; i < V; ++i)
        if (i < valid) pointer[i] = pack.items[i];
}

// COUNT packs, `step` elements apart, all in flight at once. `valid` and `step` in elements. The whole ones are one branch for all: with
// one for each, every load is waited for before the next, as both ways of a branch have to end in the same registers.
template <typename T, int V, int COUNT>
DEVICE void load_packs(Pack<T, V> (&packs)[COUNT], const T* pointer, i64 step, i64 valid, bool wide, T fill) {
    if (wide && (COUNT - 1) * step + V <= valid) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) packs[i] = load_whole<T, V>(pointer + i * step);
        return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) packs[i] = load_pack<T, V>(pointer + i * step, valid - i * step, wide, fill);
}

DEVICE i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
DEVICE i64 larger(i64 a, i64 b) { return a > b ? a : b; }
