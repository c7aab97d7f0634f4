// Attention over a range of slots; compiled once for each instruction set.
#include "attend.h"

#include <algorithm>
#include <limits>

#include "lanes.h"

namespace {

// Query heads that share a key are handled so many at a time, and so many vectors of a value.
constexpr int HEADS = 4;
constexpr int WIDE = LANES == 8 ? 2 : 4;

struct Int8 { int8_t code; };
struct Float8 { uint8_t bits; };

template <>
struct Read<Int8> {
  static Floats at(const Int8* codes) { return floats(from_bytes(codes)); }
};
template <>
struct Read<Float8> {
  static Floats at(const Float8* codes) { return from_float8(halves_of_bytes(codes)) * FLOAT8_UNIT; }
};

template <class T>
constexpr bool in_codes = sizeof(T) == 1;

// The exponential function of numbers that are not positive, within 2e-7 of its value; 0 below -87, NaN of NaN.
inline Floats exponential(Floats x) {
  const Ints power = rounded(x * 1.44269504f);
  const Floats n = floats(power), f = x - n * 0.693145752f - n * 1.42860677e-6f;
  Floats p = f * (1.0f / 5040) + 1.0f / 720;
  p = p * f + 1.0f / 120, p = p * f + 1.0f / 24, p = p * f + 1.0f / 6, p = p * f + 0.5f, p = p * f + 1, p = p * f + 1;
  const Floats whole = (Floats)(((Words)power + 127u) << 23);
  return (Floats)((Words)(p * whole) & ~(Words)(x < -87.0f));
}

// The scores of `heads` queries and the visible slots, into scores[head * RANGE + i].
template <class T, int heads>
void score(const Attention& a, const float* q, const T* k, const float* scales, const int16_t* visible, int count,
           float* scores) {
  for (int i = 0; i < count; i++) {
    const T* key = k + visible[i] * a.head_dim;
    Floats sums[heads] = {};
    for (int64_t d = 0; d < a.head_dim; d += LANES) {
      const Floats numbers = Read<T>::at(key + d);
      for (int head = 0; head < heads; head++) sums[head] += numbers * load<Floats>(q + head * a.head_dim + d);
    }
    const float scale = in_codes<T> ? a.scale * scales[visible[i]] : a.scale;
    for (int head = 0; head < heads; head++) scores[head * RANGE + i] = sum_of(sums[head]) * scale;
  }
}

// Adds up the values of the visible slots, each with its weight, `wide` vectors of them from `d` on.
template <class T, int heads, int wide>
void mix(const Attention& a, const T* v, const int16_t* visible, int count, const float* weights, int64_t d, float* part) {
  Floats sums[heads][wide] = {};
  for (int i = 0; i < count; i++) {
    const T* value = v + visible[i] * a.head_dim + d;
    for (int at = 0; at < wide; at++) {
      const Floats numbers = Read<T>::at(value + at * LANES);
      for (int head = 0; head < heads; head++) sums[head][at] += numbers * weights[head * RANGE + i];
    }
  }
  for (int head = 0; head < heads; head++)
    for (int at = 0; at < wide; at++)
      std::memcpy(part + head * a.part_size() + 2 + d + at * LANES, &sums[head][at], sizeof(Floats));
}

template <class T, int heads>
void attend_heads(const Attention& a, const float* q, const T* k, const T* v, const float* k_scales,
                  const float* v_scales, const int16_t* visible, int count, float* part) {
  float scores[heads * RANGE + LANES];
  score<T, heads>(a, q, k, k_scales, visible, count, scores);
  for (int head = 0; head < heads; head++) {
    float *row = scores + head * RANGE, largest = std::numeric_limits<float>::lowest(), sum = 0;
    for (int i = 0; i < count; i++) largest = std::max(largest, row[i]);
    // What stands after the last score belongs to the next head or to nobody, so it is kept.
    for (int i = 0; i < count; i += LANES) {
      float after[LANES];
      const Floats weights = exponential(load<Floats>(row + i) - largest);
      std::memcpy(after, &weights, sizeof after);
      const int rest = std::min(LANES, count - i);
      for (int lane = 0; lane < rest; lane++) row[i + lane] = after[lane], sum += after[lane];
    }
    part[head * a.part_size()] = largest, part[head * a.part_size() + 1] = sum;
    if constexpr (in_codes<T>)
      for (int i = 0; i < count; i++) row[i] *= v_scales[visible[i]];
  }
  int64_t d = 0;
  for (; d + WIDE * LANES <= a.head_dim; d += WIDE * LANES) mix<T, heads, WIDE>(a, v, visible, count, scores, d, part);
  for (; d < a.head_dim; d += LANES) mix<T, heads, 1>(a, v, visible, count, scores, d, part);
}

template <class T>
void attend(const Attention& a, int64_t unit, float* parts) {
  const int64_t ranges = a.ranges(), range = unit % ranges, kv_head = unit / ranges % a.kv_heads;
  const int64_t row = unit / ranges / a.kv_heads, from = range * RANGE, to = std::min(a.slots, from + RANGE);
  const int64_t at = ((row * a.kv_heads + kv_head) * a.slots + from) * a.head_dim;
  const T *k = static_cast<const T*>(a.k) + at, *v = static_cast<const T*>(a.v) + at;
  const int64_t slot = (row * a.kv_heads + kv_head) * a.slots + from;
  const float *k_scales = in_codes<T> ? a.k_scales + slot : nullptr, *v_scales = in_codes<T> ? a.v_scales + slot : nullptr;
  for (int64_t query = 0; query < a.seq; query++) {
    const uint8_t* mask = a.mask + (row * a.seq + query) * a.slots;
    int16_t visible[RANGE];
    int count = 0;
    for (int64_t slot = from; slot < to; slot++) {
      visible[count] = int16_t(slot - from);
      count += mask[slot] != 0;
    }
    const float* q = a.q + ((row * a.seq + query) * a.kv_heads + kv_head) * a.group * a.head_dim;
    float* part = parts + (unit * a.seq + query) * a.group * a.part_size();
    for (int64_t head = 0; head < a.group;) {
      const float* own = q + head * a.head_dim;
      float* result = part + head * a.part_size();
      switch (std::min<int64_t>(a.group - head, HEADS)) {
        case 1: attend_heads<T, 1>(a, own, k, v, k_scales, v_scales, visible, count, result), head += 1; break;
        case 2: attend_heads<T, 2>(a, own, k, v, k_scales, v_scales, visible, count, result), head += 2; break;
        case 3: attend_heads<T, 3>(a, own, k, v, k_scales, v_scales, visible, count, result), head += 3; break;
        default: attend_heads<T, 4>(a, own, k, v, k_scales, v_scales, visible, count, result), head += 4;
      }
    }
  }
}

}  // namespace

namespace SET {
const Attending attending = {attend<float>, attend<BFloat16>, attend<Float16>, attend<Int8>, attend<Float8>, LANES};
}
