// The vectors of one instruction set: as many 32-bit lanes as a register has, each lane a row of a weight.
//
// Everything but the functions at the end is plain arithmetic on vectors, which GCC and Clang compile for any set.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512VNNI__)
#define LANES 16
#define SET avx512
#elif defined(__AVX2__)
#define LANES 8
#define SET avx2
#elif defined(__ARM_FEATURE_DOTPROD)
#define LANES 4
#define SET neon
#else
#error "No instructions for products of 8-bit numbers; this file is compiled once for each set that has them."
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

namespace {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));

template <class T>
inline T load(const void* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

inline Floats floats(Ints x) { return __builtin_convertvector(x, Floats); }
inline Floats floats(Words x) { return floats(Ints(x)); }  // For numbers below 2^31.
inline Words widened(Halves x) { return __builtin_convertvector(x, Words); }
inline Floats from_bfloat16(Halves x) { return (Floats)(widened(x) << 16); }

// A number of this size has no fraction: a sum with it is rounded to the nearest integer, in its lowest bits.
inline Ints rounded(Floats x) { return (Ints)((Words)(x + 12582912.0f) - 0x4b400000u); }

// The entries of a table at each lane.
inline Floats gathered(Words index, const float* table) {
  float found[LANES];
  for (int i = 0; i < LANES; i++) found[i] = table[index[i]];
  return load<Floats>(found);
}

// The `i`-th four numbers of 8 bits.
inline int32_t four_of(const int8_t* x, int i) { return load<int32_t>(x + 4 * i); }

inline Floats from_float16(Halves x);

// Numbers in float8 e4m3, divided by 256, from their codes with sign extension: float16 has one bit more in the exponent.
// The code of NaN becomes one of float16's.
constexpr float FLOAT8_UNIT = 256;
inline Floats from_float8(Halves codes) {
  const Halves bits = (codes << 7) & (uint16_t)0xbf80;
  return from_float16(bits | (((bits & (uint16_t)0x3f80) + (uint16_t)0x80) & (uint16_t)0x4000));
}

// ---- what differs between the sets ----

#if defined(__AVX512VNNI__)

inline float sum_of(Floats x) { return _mm512_reduce_add_ps((__m512)x); }

// a * b + c, rounded once. Compilers choose for each place whether they round `a * b + c` once or twice.
inline Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

// Signed numbers of 8 bits, in 32 and in 16 bits.
inline Ints from_bytes(const void* at) { return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at)); }

inline Halves halves_of_bytes(const void* at) {
  return (Halves)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)at));
}

inline Floats from_float16(Halves x) { return _mm512_cvtph_ps((__m256i)x); }

// Products of four unsigned codes of each lane and four signed numbers of 8 bits, added up.
template <int largest, int count>
inline Ints dot(const Words* codes, const int8_t* x) {
  __m512i sum = _mm512_setzero_si512();
  for (int i = 0; i < count; i++) sum = _mm512_dpbusd_epi32(sum, (__m512i)codes[i], _mm512_set1_epi32(four_of(x, i)));
  return (Ints)sum;
}

// These instructions have no signed codes: 128 is added to them, and later taken off.
constexpr int SIGNED_ZERO = 128;
template <int count>
inline Ints dot_signed(const Words* codes, const int8_t* x) {
  __m512i sum = _mm512_setzero_si512();
  for (int i = 0; i < count; i++)
    sum = _mm512_dpbusd_epi32(sum, (__m512i)(codes[i] ^ 0x80808080u), _mm512_set1_epi32(four_of(x, i)));
  return (Ints)sum;
}

// Adds the products of two numbers of 16 bits of each lane and a pair. Other sets have nothing that is faster than floats.
#define PAIRS
inline Ints dot_pairs(Ints sum, Words codes, int32_t pair) {
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(pair));
}

// For each byte the entry of a table at its value, which is below 16.
inline Words looked_up(Words codes, const int8_t* table) {
  return (Words)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), (__m512i)codes);
}

// For each lane the entry of a table of 16 at its lowest four bits.
inline Floats looked_up(Words codes, const float* table) {
  return (Floats)_mm512_permutexvar_ps((__m512i)codes, _mm512_loadu_ps(table));
}

#elif defined(__AVX2__)

inline float sum_of(Floats x) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

inline Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

inline Ints from_bytes(const void* at) { return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at)); }

inline Halves halves_of_bytes(const void* at) {
  return (Halves)_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)at));
}

inline Floats from_float16(Halves x) { return (Floats)_mm256_cvtph_ps((__m128i)x); }

// Sums of two products have 16 bits; `largest` says how many of these can be added before they are widened.
template <int largest, int count>
inline Ints dot(const Words* codes, const int8_t* x) {
  constexpr int fit = 32767 / (largest * 127 * 2), step = fit < count ? fit : count;
  static_assert(fit >= 1 && count % step == 0);
  __m256i sum = _mm256_setzero_si256();
  for (int i = 0; i < count; i += step) {
    __m256i part = _mm256_maddubs_epi16((__m256i)codes[i], _mm256_set1_epi32(four_of(x, i)));
    for (int j = i + 1; j < i + step; j++)
      part = _mm256_add_epi16(part, _mm256_maddubs_epi16((__m256i)codes[j], _mm256_set1_epi32(four_of(x, j))));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
  }
  return (Ints)sum;
}

constexpr int SIGNED_ZERO = 0;
template <int count>
inline Ints dot_signed(const Words* codes, const int8_t* x) {
  __m256i sum = _mm256_setzero_si256();
  for (int i = 0; i < count; i++) {
    // 128 * 127 * 2 still fits 16 bits, as no x is -128.
    __m256i w = (__m256i)codes[i], signs = _mm256_sign_epi8(_mm256_set1_epi32(four_of(x, i)), w);
    sum = _mm256_add_epi32(
        sum, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), signs), _mm256_set1_epi16(1)));
  }
  return (Ints)sum;
}

inline Words looked_up(Words codes, const int8_t* table) {
  return (Words)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table)),
                                    (__m256i)codes);
}

inline Floats looked_up(Words codes, const float* table) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)codes);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)codes);
  return (Floats)_mm256_blendv_ps(low, high, (__m256)(codes << 28));
}

#else

inline float sum_of(Floats x) { return vaddvq_f32((float32x4_t)x); }

inline Floats fused(Floats a, Floats b, Floats c) {
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}

inline Halves halves_of_bytes(const void* at) {
  return (Halves)vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(load<int32_t>(at)))));
}

inline Ints from_bytes(const void* at) { return (Ints)vmovl_s16((int16x4_t)halves_of_bytes(at)); }

inline Floats from_float16(Halves x) { return (Floats)vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)x)); }

template <int largest, int count>
inline Ints dot(const Words* codes, const int8_t* x) {
  int32x4_t sum = vdupq_n_s32(0);
  for (int i = 0; i < count; i++)
    sum = vdotq_s32(sum, vreinterpretq_s8_u32((uint32x4_t)codes[i]), vreinterpretq_s8_s32(vdupq_n_s32(four_of(x, i))));
  return (Ints)sum;
}

constexpr int SIGNED_ZERO = 0;
template <int count>
inline Ints dot_signed(const Words* codes, const int8_t* x) { return dot<127, count>(codes, x); }

inline Words looked_up(Words codes, const int8_t* table) {
  return (Words)vqtbl1q_s8(vld1q_s8(table), vreinterpretq_u8_u32((uint32x4_t)codes));
}

inline Floats looked_up(Words codes, const float* table) {
  // The four bytes of each entry.
  const Words bytes = (codes & 15u) * 0x04040404u + 0x03020100u;
  return (Floats)vqtbl4q_u8(load<uint8x16x4_t>(table), vreinterpretq_u8_u32((uint32x4_t)bytes));
}

#endif

// ---- numbers as they are stored ----

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

template <class T>
struct Read;
template <>
struct Read<float> {
  static Floats at(const float* numbers) { return load<Floats>(numbers); }
};
template <>
struct Read<BFloat16> {
  static Floats at(const BFloat16* numbers) { return from_bfloat16(load<Halves>(numbers)); }
};
template <>
struct Read<Float16> {
  static Floats at(const Float16* numbers) { return from_float16(load<Halves>(numbers)); }
};

}  // namespace
