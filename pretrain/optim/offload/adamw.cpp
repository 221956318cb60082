// AdamW on host memory in one pass: unscale and clip the gradient, update master and moments, write the weight.
//
// The operations, their order and their rounding are those of `arithmetic.adamw_`: every multiplication, addition,
// division and square root is rounded to FP32 by itself. The build turns contraction off (-ffp-contract=off), so that
// no fused multiply-add appears, and each thread runs with gradual underflow whatever its caller has set. Every level
// (scalar, AVX2, AVX-512), number of threads and cut of the arrays therefore gives the same bits.
//
// Plain C interface, called through ctypes: see `adamw_step` at the end. The file includes itself once for each
// vector level, with the operations of that level defined before (macro ADAMW_LEVEL_BODY).

#ifndef ADAMW_LEVEL_BODY

#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ADAMW_X86 1
#include <cpuid.h>
#include <immintrin.h>
#else
#define ADAMW_X86 0
#endif

namespace {

enum Kind : int { FP32 = 0, BF16 = 1, FP16 = 2, NONE = 3 };

struct Scalars {  // as `StepScalars`, in this order
    float grad_scale, beta1, w1, beta2, w2, decay, step_size, inv_root, eps;
};

struct Arrays {
    const void* gradient;
    float* master;       // FULL
    uint16_t* low;       // LOW_BITS: the low half of the master; the weight holds the rest
    float* exp_avg;
    float* exp_avg_sq;
    void* weight;
    Scalars s;
};

constexpr uint32_t QUIET_NAN = 0x7FC00000u;

inline uint32_t bits_of(float x) { uint32_t b; std::memcpy(&b, &x, 4); return b; }
inline float float_of(uint32_t b) { float x; std::memcpy(&x, &b, 4); return x; }

inline float widen_half(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
    if (magnitude >= 0x7C00u) return float_of(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
    if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
    return float_of(sign | bits_of(float(magnitude) * 0x1p-24f));  // zero and subnormal: exact
}

inline uint16_t narrow_half(float x) {  // to nearest even
    const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return uint16_t(sign | 0x7E00u);
    if (magnitude >= 0x477FF000u) return uint16_t(sign | 0x7C00u);  // rounds beyond 65504
    if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, rounded by adding 0.5
        return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u));
    }
    return uint16_t(sign | ((magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13));
}

template <int KIND>
inline float read(const void* source, int64_t i) {
    if (KIND == FP32) return static_cast<const float*>(source)[i];
    const uint16_t h = static_cast<const uint16_t*>(source)[i];
    return KIND == BF16 ? float_of(uint32_t(h) << 16) : widen_half(h);
}

template <int GRADIENT, int WEIGHT, bool LOW>
inline void update_one(const Arrays& a, int64_t i) {
    const Scalars& s = a.s;
    float m = a.exp_avg[i], v = a.exp_avg_sq[i], p;
    uint16_t* const half = static_cast<uint16_t*>(a.weight);
    if (LOW) {
        const uint32_t low = a.low[i], v_bits = bits_of(v);
        const uint32_t rounded_up = low + (v_bits >> 31) > 0x8000u;
        p = float_of(((uint32_t(half[i]) - rounded_up) << 16) | low);
        v = float_of(v_bits & 0x7FFFFFFFu);
    } else {
        p = a.master[i];
    }
    const float g = read<GRADIENT>(a.gradient, i) * s.grad_scale;
    m = m + s.w1 * (g - m);
    v = s.beta2 * v + s.w2 * (g * g);
    p = p * s.decay;
    p = p - s.step_size * (m / (std::sqrt(v) * s.inv_root + s.eps));
    a.exp_avg[i] = m;
    if (LOW || WEIGHT == BF16) {
        const uint32_t bits = p != p ? QUIET_NAN : bits_of(p);
        const uint32_t odd = (bits >> 16) & 1u;
        half[i] = uint16_t((bits + 0x7FFFu + odd) >> 16);
        if (LOW) {
            a.low[i] = uint16_t(bits);
            const uint32_t tie_up = (bits & 0xFFFFu) == 0x8000u ? odd << 31 : 0u;
            v = float_of((bits_of(v) & 0x7FFFFFFFu) | tie_up);
        }
    }
    if (!LOW) {
        a.master[i] = p;
        if (WEIGHT == FP32) static_cast<float*>(a.weight)[i] = p;
        if (WEIGHT == FP16) half[i] = narrow_half(p);
    }
    a.exp_avg_sq[i] = v;
}

using Range = void (*)(const Arrays&, int64_t begin, int64_t end);

namespace scalar {
template <int GRADIENT, int WEIGHT, bool LOW>
__attribute__((noinline)) void range(const Arrays& arrays, int64_t begin, int64_t end) {
    const Arrays a = arrays;  // its own: a store to an array cannot change it
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) update_one<GRADIENT, WEIGHT, LOW>(a, i);
}
}  // namespace scalar

#if ADAMW_X86
#define INLINE static inline __attribute__((always_inline)) TARGET

namespace avx2 {
#define TARGET __attribute__((target("avx2,f16c")))
using Floats = __m256;
using Ints = __m256i;
constexpr int LANES = 8;
INLINE Floats load(const float* x) { return _mm256_loadu_ps(x); }
INLINE void store(float* x, Floats a) { _mm256_storeu_ps(x, a); }
INLINE Floats all(float x) { return _mm256_set1_ps(x); }
INLINE Ints all_bits(uint32_t x) { return _mm256_set1_epi32(int(x)); }
INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
INLINE Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
INLINE Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
INLINE Floats root(Floats a) { return _mm256_sqrt_ps(a); }
INLINE Floats floats(Ints a) { return _mm256_castsi256_ps(a); }
INLINE Ints ints(Floats a) { return _mm256_castps_si256(a); }
INLINE Ints bit_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }
INLINE Ints bit_or(Ints a, Ints b) { return _mm256_or_si256(a, b); }
INLINE Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
INLINE Ints sub_ints(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
template <int N> INLINE Ints right(Ints a) { return _mm256_srli_epi32(a, N); }
template <int N> INLINE Ints left(Ints a) { return _mm256_slli_epi32(a, N); }
INLINE Ints where_greater(Ints a, Ints b, Ints value) { return _mm256_and_si256(_mm256_cmpgt_epi32(a, b), value); }
INLINE Ints where_equal(Ints a, Ints b, Ints value) { return _mm256_and_si256(_mm256_cmpeq_epi32(a, b), value); }
INLINE Ints quiet(Floats a) {
    return ints(_mm256_blendv_ps(a, floats(all_bits(QUIET_NAN)), _mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}
INLINE Ints load_halves(const uint16_t* x) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
INLINE Floats load_fp16(const uint16_t* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
INLINE Ints fp16_bits(Floats a) { return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
template <bool STREAM> INLINE void store_halves(uint16_t* x, Ints a, Ints b) {  // 16-bit values in 32-bit lanes
    const Ints packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8);
    if (STREAM) _mm256_stream_si256(reinterpret_cast<Ints*>(x), packed);
    else _mm256_storeu_si256(reinterpret_cast<Ints*>(x), packed);
}
INLINE void store_stream(float* x, Floats a) { _mm256_stream_ps(x, a); }
#define ADAMW_LEVEL_BODY
#include "adamw.cpp"
#undef ADAMW_LEVEL_BODY
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx2,f16c")))
using Floats = __m512;
using Ints = __m512i;
constexpr int LANES = 16;
INLINE Floats load(const float* x) { return _mm512_loadu_ps(x); }
INLINE void store(float* x, Floats a) { _mm512_storeu_ps(x, a); }
INLINE Floats all(float x) { return _mm512_set1_ps(x); }
INLINE Ints all_bits(uint32_t x) { return _mm512_set1_epi32(int(x)); }
INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
INLINE Floats root(Floats a) { return _mm512_sqrt_ps(a); }
INLINE Floats floats(Ints a) { return _mm512_castsi512_ps(a); }
INLINE Ints ints(Floats a) { return _mm512_castps_si512(a); }
INLINE Ints bit_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
INLINE Ints bit_or(Ints a, Ints b) { return _mm512_or_si512(a, b); }
INLINE Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
INLINE Ints sub_ints(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
template <int N> INLINE Ints right(Ints a) { return _mm512_srli_epi32(a, N); }
template <int N> INLINE Ints left(Ints a) { return _mm512_slli_epi32(a, N); }
INLINE Ints where_greater(Ints a, Ints b, Ints value) {
    return _mm512_maskz_mov_epi32(_mm512_cmpgt_epi32_mask(a, b), value);
}
INLINE Ints where_equal(Ints a, Ints b, Ints value) {
    return _mm512_maskz_mov_epi32(_mm512_cmpeq_epi32_mask(a, b), value);
}
INLINE Ints quiet(Floats a) {
    return _mm512_mask_mov_epi32(ints(a), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), all_bits(QUIET_NAN));
}
INLINE Ints load_halves(const uint16_t* x) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
INLINE Floats load_fp16(const uint16_t* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
INLINE Ints fp16_bits(Floats a) { return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
template <bool STREAM> INLINE void store_halves(uint16_t* x, Ints a, Ints b) {
    const Ints low = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(a));
    const Ints packed = _mm512_inserti64x4(low, _mm512_cvtepi32_epi16(b), 1);
    if (STREAM) _mm512_stream_si512(reinterpret_cast<Ints*>(x), packed);
    else _mm512_storeu_si512(x, packed);
}
INLINE void store_stream(float* x, Floats a) { _mm512_stream_ps(x, a); }
#define ADAMW_LEVEL_BODY
#include "adamw.cpp"
#undef ADAMW_LEVEL_BODY
#undef TARGET
}  // namespace avx512

bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
}

struct Gradual {  // IEEE arithmetic in this thread: round to nearest, subnormals kept, no traps
    unsigned before = _mm_getcsr();
    Gradual() { _mm_setcsr(0x1F80); }
    ~Gradual() { _mm_setcsr(before); }
};
#else
struct Gradual {};
#endif

template <int GRADIENT, int WEIGHT, bool LOW>
Range at_level(int level) {
#if ADAMW_X86
    if (level == 2) return avx512::range<GRADIENT, WEIGHT, LOW>;
    if (level == 1) return avx2::range<GRADIENT, WEIGHT, LOW>;
#endif
    return level == 0 ? scalar::range<GRADIENT, WEIGHT, LOW> : nullptr;
}

template <int GRADIENT>
Range with_weight(int weight, bool low, int level) {
    if (low) return weight == BF16 ? at_level<GRADIENT, BF16, true>(level) : nullptr;
    switch (weight) {
        case FP32: return at_level<GRADIENT, FP32, false>(level);
        case BF16: return at_level<GRADIENT, BF16, false>(level);
        case FP16: return at_level<GRADIENT, FP16, false>(level);
        case NONE: return at_level<GRADIENT, NONE, false>(level);
        default: return nullptr;
    }
}

Range choose(int gradient, int weight, bool low, int level) {
    switch (gradient) {
        case FP32: return with_weight<FP32>(weight, low, level);
        case BF16: return with_weight<BF16>(weight, low, level);
        case FP16: return with_weight<FP16>(weight, low, level);
        default: return nullptr;
    }
}

}  // namespace

// The highest level that this processor runs: 2 AVX-512, 1 AVX2, 0 scalar.
extern "C" int adamw_best_level() {
#if ADAMW_X86
    // Asked once: the instruction that tells is slow, in a virtual machine very slow.
    static const int best = [] {
        __builtin_cpu_init();
        if (!has_f16c() || !__builtin_cpu_supports("avx2")) return 0;
        return __builtin_cpu_supports("avx512f") ? 2 : 1;
    }();
    return best;
#else
    return 0;
#endif
}

// One step on `count` elements. Kinds: 0 FP32, 1 BF16, 2 FP16, 3 none (weight only). With `low_bits` the master holds
// 16 bits an element and the weight is BF16, read and written. Returns 0, or 1 when such kinds or level do not exist.
extern "C" int adamw_step(int level, int threads, int64_t count, const void* gradient, int gradient_kind, void* master,
                          int low_bits, float* exp_avg, float* exp_avg_sq, void* weight, int weight_kind,
                          const float* scalars) {
    const Range range = choose(gradient_kind, weight_kind, low_bits != 0, level);
    if (range == nullptr || level > adamw_best_level() || threads < 1) return 1;
    Arrays a{gradient, static_cast<float*>(master), static_cast<uint16_t*>(master), exp_avg, exp_avg_sq, weight, {}};
    std::memcpy(&a.s, scalars, sizeof(Scalars));
    // Shares of whole 4 KiB pages of FP32, so that two threads rarely write one page.
    const int64_t share = ((count + threads - 1) / threads + 1023) / 1024 * 1024;
#pragma omp parallel num_threads(threads) if (threads > 1 && share < count)
    {
        const Gradual gradual;
        // As many workers as there are: the runtime may give fewer than asked for.
        for (int64_t begin = omp_get_thread_num() * share; begin < count; begin += omp_get_num_threads() * share) {
            range(a, begin, begin + share < count ? begin + share : count);
        }
        (void)gradual;
    }
    return 0;
}

#else  // the body of one vector level

#ifndef ADAMW_AHEAD
#define ADAMW_AHEAD 256  // elements from the one in work to the one fetched
#endif

INLINE void fetch(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0); }

template <int KIND> INLINE Floats read_gradient(const void* source, int64_t i) {
    if (KIND == FP32) return load(static_cast<const float*>(source) + i);
    const uint16_t* const halves = static_cast<const uint16_t*>(source) + i;
    return KIND == BF16 ? floats(left<16>(load_halves(halves))) : load_fp16(halves);
}

template <int GRADIENT, int WEIGHT, bool LOW, bool STREAM> TARGET
static void blocks(const Arrays& a, int64_t begin, int64_t end) {
    const Floats scale = all(a.s.grad_scale), w1 = all(a.s.w1), beta2 = all(a.s.beta2), w2 = all(a.s.w2);
    const Floats decay = all(a.s.decay), step_size = all(a.s.step_size), inv_root = all(a.s.inv_root);
    const Floats eps = all(a.s.eps);
    // Pointers of its own, and all loads of a block before its stores: otherwise the compiler must assume that a store
    // changes a pointer or the next values.
    const void* const gradient = a.gradient;
    float* const master = a.master;
    uint16_t* const low = a.low;
    float* const exp_avg = a.exp_avg;
    float* const exp_avg_sq = a.exp_avg_sq;
    void* const weight = a.weight;
    uint16_t* const half = static_cast<uint16_t*>(weight);
    for (int64_t i = begin; i < end; i += 2 * LANES) {
        for (int64_t ahead = i + ADAMW_AHEAD; ahead < i + ADAMW_AHEAD + 2 * LANES; ahead += 16) {
            if (!LOW) fetch(master + ahead);
            fetch(exp_avg + ahead);
            fetch(exp_avg_sq + ahead);
            if (GRADIENT == FP32) fetch(static_cast<const float*>(gradient) + ahead);
        }
        // 16-bit arrays have 32 elements in a cache line.
        if (GRADIENT != FP32) fetch(static_cast<const uint16_t*>(gradient) + i + ADAMW_AHEAD);
        if (LOW) {
            fetch(low + i + ADAMW_AHEAD);
            fetch(half + i + ADAMW_AHEAD);
        }
        Floats m[2], v[2], p[2], g[2];
        Ints weights[2], lows[2];
        for (int part = 0; part < 2; ++part) {
            const int64_t j = i + part * LANES;
            m[part] = load(exp_avg + j);
            v[part] = load(exp_avg_sq + j);
            g[part] = read_gradient<GRADIENT>(gradient, j);
            if (LOW) {
                const Ints bits = load_halves(low + j), v_bits = ints(v[part]);
                const Ints tagged = add_ints(bits, right<31>(v_bits));
                const Ints rounded_up = where_greater(tagged, all_bits(0x8000u), all_bits(0x10000u));
                p[part] = floats(sub_ints(bit_or(left<16>(load_halves(half + j)), bits), rounded_up));
                v[part] = floats(bit_and(v_bits, all_bits(0x7FFFFFFFu)));
            } else {
                p[part] = load(master + j);
            }
        }
        for (int part = 0; part < 2; ++part) {
            g[part] = mul(g[part], scale);
            m[part] = add(m[part], mul(w1, sub(g[part], m[part])));
            v[part] = add(mul(beta2, v[part]), mul(w2, mul(g[part], g[part])));
            const Floats denominator = add(mul(root(v[part]), inv_root), eps);
            p[part] = sub(mul(p[part], decay), mul(step_size, divide(m[part], denominator)));
            if (LOW || WEIGHT == BF16) {
                const Ints bits = quiet(p[part]);
                const Ints odd = bit_and(right<16>(bits), all_bits(1));
                weights[part] = right<16>(add_ints(bits, add_ints(odd, all_bits(0x7FFFu))));
                if (LOW) {
                    lows[part] = bit_and(bits, all_bits(0xFFFFu));
                    const Ints tie_up = where_equal(lows[part], all_bits(0x8000u), left<31>(odd));
                    v[part] = floats(bit_or(bit_and(ints(v[part]), all_bits(0x7FFFFFFFu)), tie_up));
                }
            }
            if (WEIGHT == FP16) weights[part] = fp16_bits(p[part]);
        }
        for (int part = 0; part < 2; ++part) {
            const int64_t j = i + part * LANES;
            store(exp_avg + j, m[part]);
            store(exp_avg_sq + j, v[part]);
            if (!LOW) store(master + j, p[part]);
            if (WEIGHT == FP32) {
                float* const out = static_cast<float*>(weight) + j;
                if (STREAM) store_stream(out, p[part]);
                else store(out, p[part]);
            }
        }
        if (LOW || WEIGHT == BF16 || WEIGHT == FP16) store_halves<STREAM>(half + i, weights[0], weights[1]);
        if (LOW) store_halves<false>(low + i, lows[0], lows[1]);
    }
}

template <int GRADIENT, int WEIGHT, bool LOW> TARGET
static void range(const Arrays& a, int64_t begin, int64_t end) {
    // A weight that is only written goes past the caches, which needs aligned blocks; one that was read is in them.
    constexpr bool WRITES_ONLY = WEIGHT != NONE && !LOW;
    constexpr int SIZE = WEIGHT == FP32 ? 4 : 2;
    constexpr uintptr_t ALIGNMENT = 64;
    bool stream = WRITES_ONLY && reinterpret_cast<uintptr_t>(a.weight) % SIZE == 0;
    int64_t i = begin;
    if (stream) {
        const uintptr_t address = reinterpret_cast<uintptr_t>(a.weight) + uintptr_t(begin) * SIZE;
        const int64_t head = int64_t((ALIGNMENT - address % ALIGNMENT) % ALIGNMENT / SIZE);
        i = head < end - begin ? begin + head : end;
        scalar::range<GRADIENT, WEIGHT, LOW>(a, begin, i);
    }
    const int64_t whole = i + (end - i) / (2 * LANES) * (2 * LANES);
    if (stream) {
        blocks<GRADIENT, WEIGHT, LOW, WRITES_ONLY>(a, i, whole);
        _mm_sfence();
    } else {
        blocks<GRADIENT, WEIGHT, LOW, false>(a, i, whole);
    }
    scalar::range<GRADIENT, WEIGHT, LOW>(a, whole, end);
}

#endif
