// The block formats, for 16 rows at a time; mistral_eqx/quant/ has the same formats in JAX: ggml.py, integers.py and
// floats.py.
//
// A panel holds the blocks of 16 rows, field by field: of each field first the leading 4 bytes of all rows, then the
// next 4, and so on; of fields of 1 or 2 bytes, these of all rows. So 4 codes of a row are one lane of a vector.
#pragma once
#include "lanes.h"
#include "panels.h"

namespace {

constexpr int ROWS = 16;

// The lanes of a panel that one vector holds, counted in vectors: `strip` of ROWS / LANES.
struct Panel {
  static constexpr bool exact = false;
  static constexpr int bits = 0;
  const uint8_t* block;
  int strip;
  int numbers = 0;  // Of a block.

  // The `index`-th 4 bytes of the field that begins at byte `field` of a row's block.
  Words four(int field, int index) const {
    return load<Words>(block + ROWS * (field + 4 * index) + 4 * LANES * strip);
  }
  Halves two(int field) const { return load<Halves>(block + ROWS * field + 2 * LANES * strip); }
  const uint8_t* one(int field) const { return block + ROWS * field + LANES * strip; }
  Floats half(int field) const { return from_float16(two(field)); }
  // One byte of each row, as numbers.
  Words byte(int field, int index) const { return byte_of(four(field, index / 4), index % 4); }
  static Words byte_of(Words x, int index) { return (x >> (8 * index)) & 0xffu; }
};

inline Words low4(Words x) { return x & 0x0f0f0f0fu; }
inline Words high4(Words x) { return (x >> 4) & 0x0f0f0f0fu; }
// Four bits, each in the lowest bit of a byte.
inline Words spread(Words bits) { return ((bits & 0xfu) * 0x00204081u) & 0x01010101u; }

// Each format of whole codes has
// - size, bytes: numbers and bytes of a block, where 0 is any multiple of 32, with codes of `bits` beside the bytes;
// - group: how many numbers share a scale at least, 16 or 32;
// - largest: the largest code, or 0 for signed codes; zero: what is taken off each code;
// - codes(part): the codes of the `part`-th 32 numbers, four in each lane;
// - scale(group), offset(group): number = scale * (code - zero) + offset.

struct Q4_0 : Panel {
  static constexpr int size = 32, bytes = 18, group = 32, largest = 15, zero = 8;
  void codes(int, Words* out) const {
    for (int i = 0; i < 4; i++) out[i] = low4(four(2, i)), out[4 + i] = high4(four(2, i));
  }
  Floats scale(int) const { return half(0); }
  static constexpr bool has_offset = false;
  Floats offset(int) const { return Floats{}; }
};

struct Q4_1 : Panel {
  static constexpr int size = 32, bytes = 20, group = 32, largest = 15, zero = 0;
  void codes(int, Words* out) const {
    for (int i = 0; i < 4; i++) out[i] = low4(four(4, i)), out[4 + i] = high4(four(4, i));
  }
  Floats scale(int) const { return half(0); }
  static constexpr bool has_offset = true;
  Floats offset(int) const { return half(2); }
};

struct Q5_0 : Panel {
  static constexpr int size = 32, bytes = 22, group = 32, largest = 31, zero = 16;
  void codes(int, Words* out) const {
    Words fifth = four(2, 0);
    for (int i = 0; i < 4; i++) {
      out[i] = low4(four(6, i)) | spread(fifth >> (4 * i)) << 4;
      out[4 + i] = high4(four(6, i)) | spread(fifth >> (16 + 4 * i)) << 4;
    }
  }
  Floats scale(int) const { return half(0); }
  static constexpr bool has_offset = false;
  Floats offset(int) const { return Floats{}; }
};

struct Q5_1 : Panel {
  static constexpr int size = 32, bytes = 24, group = 32, largest = 31, zero = 0;
  void codes(int, Words* out) const {
    Words fifth = four(4, 0);
    for (int i = 0; i < 4; i++) {
      out[i] = low4(four(8, i)) | spread(fifth >> (4 * i)) << 4;
      out[4 + i] = high4(four(8, i)) | spread(fifth >> (16 + 4 * i)) << 4;
    }
  }
  Floats scale(int) const { return half(0); }
  static constexpr bool has_offset = true;
  Floats offset(int) const { return half(2); }
};

struct Q8_0 : Panel {
  static constexpr int size = 32, bytes = 34, group = 32, largest = 0, zero = 0;
  void codes(int, Words* out) const {
    for (int i = 0; i < 8; i++) out[i] = four(2, i);
  }
  Floats scale(int) const { return half(0); }
  static constexpr bool has_offset = false;
  Floats offset(int) const { return Floats{}; }
};

struct Q2_K : Panel {
  static constexpr int size = 256, bytes = 84, group = 16, largest = 3, zero = 0;
  void codes(int part, Words* out) const {
    for (int i = 0; i < 8; i++) out[i] = (four(16, part / 4 * 8 + i) >> (part % 4 * 2)) & 0x03030303u;
  }
  Floats scale(int group) const { return half(80) * floats(byte(0, group) & 15u); }
  static constexpr bool has_offset = true;
  Floats offset(int group) const { return -(half(82) * floats(byte(0, group) >> 4)); }
};

struct Q3_K : Panel {
  static constexpr int size = 256, bytes = 110, group = 16, largest = 7, zero = 4;
  void codes(int part, Words* out) const {
    for (int i = 0; i < 8; i++) {
      Words low = (four(32, part / 4 * 8 + i) >> (part % 4 * 2)) & 0x03030303u;
      out[i] = low | ((four(0, i) >> part) & 0x01010101u) << 2;
    }
  }
  Floats scale(int group) const {
    // Of four groups.
    const int four_groups = group / 4;
    const Words low = (four(96, four_groups % 2) >> (four_groups / 2 * 4)) & 0x0f0f0f0fu;
    const Words high = (four(96, 2) >> (four_groups * 2)) & 0x03030303u;
    return half(108) * floats(Ints(byte_of(low | high << 4, group % 4)) - 32);
  }
  static constexpr bool has_offset = false;
  Floats offset(int) const { return Floats{}; }
};

// Eight scales and eight minima of 6 bits in 12 bytes. Those of four groups come out together, a byte each: where all
// groups of a block follow each other, the compiler does this once for the four.
struct ScalesOf6Bits : Panel {
  Words six(int first, int group) const {
    const Words own = four(4, first), rest = four(4, 2) >> (4 * first);
    return byte_of(group < 4 ? own & 0x3f3f3f3fu : (rest & 0x0f0f0f0fu) | ((own >> 2) & 0x30303030u), group % 4);
  }
  Floats scale(int group) const { return half(0) * floats(six(0, group)); }
  static constexpr bool has_offset = true;
  Floats offset(int group) const { return -(half(2) * floats(six(1, group))); }
};

struct Q4_K : ScalesOf6Bits {
  static constexpr int size = 256, bytes = 144, group = 32, largest = 15, zero = 0;
  void codes(int part, Words* out) const {
    for (int i = 0; i < 8; i++) out[i] = (four(16, part / 2 * 8 + i) >> (part % 2 * 4)) & 0x0f0f0f0fu;
  }
};

struct Q5_K : ScalesOf6Bits {
  static constexpr int size = 256, bytes = 176, group = 32, largest = 31, zero = 0;
  void codes(int part, Words* out) const {
    for (int i = 0; i < 8; i++) {
      Words low = (four(48, part / 2 * 8 + i) >> (part % 2 * 4)) & 0x0f0f0f0fu;
      out[i] = low | ((four(16, i) >> part) & 0x01010101u) << 4;
    }
  }
};

struct Q6_K : Panel {
  static constexpr int size = 256, bytes = 210, group = 16, largest = 63, zero = 32;
  void codes(int part, Words* out) const {
    int half = part / 4, quarter = part % 4;
    for (int i = 0; i < 8; i++) {
      Words low = (four(0, half * 16 + quarter % 2 * 8 + i) >> (quarter / 2 * 4)) & 0x0f0f0f0fu;
      out[i] = low | ((four(128, half * 8 + i) >> (quarter * 2)) & 0x03030303u) << 4;
    }
  }
  Floats scale(int group) const { return half(208) * floats(Ints(four(192, group / 4) << (24 - group % 4 * 8)) >> 24); }
  static constexpr bool has_offset = false;
  Floats offset(int) const { return Floats{}; }
};

constexpr int8_t IQ4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct IQ4_NL : Panel {
  static constexpr int size = 32, bytes = 18, group = 32, largest = 0, zero = 0;
  void codes(int, Words* out) const {
    for (int i = 0; i < 4; i++)
      out[i] = looked_up(low4(four(2, i)), IQ4), out[4 + i] = looked_up(high4(four(2, i)), IQ4);
  }
  Floats scale(int) const { return half(0); }
  static constexpr bool has_offset = false;
  Floats offset(int) const { return Floats{}; }
};

struct IQ4_XS : Panel {
  static constexpr int size = 256, bytes = 136, group = 32, largest = 0, zero = 0;
  void codes(int part, Words* out) const {
    for (int i = 0; i < 4; i++) {
      Words both = four(8, part * 4 + i);
      out[i] = looked_up(low4(both), IQ4), out[4 + i] = looked_up(high4(both), IQ4);
    }
  }
  Floats scale(int group) const {
    const Words low = (four(4, 0) >> (group * 4)) & 15u, high = (widened(two(2)) >> (group * 2)) & 3u;
    return half(0) * floats(Ints(low | high << 4) - 32);
  }
  static constexpr bool has_offset = false;
  Floats offset(int) const { return Floats{}; }
};

// Numbers of 4 bits (e2m1), twice as large so that they are whole.
constexpr int8_t TWICE_FLOAT4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

struct MXFP4 : Panel {
  static constexpr int size = 32, bytes = 17, group = 32, largest = 0, zero = 0;
  void codes(int, Words* out) const {
    for (int i = 0; i < 4; i++) {
      const Words both = four(1, i);
      out[i] = looked_up(low4(both), TWICE_FLOAT4), out[4 + i] = looked_up(high4(both), TWICE_FLOAT4);
    }
  }
  Floats scale(int) const {
    // The exponent of a float; without one it is 2^-127, which a float has as a fraction only.
    const Words exponent = (Words)from_bytes(one(0)) << 24 >> 1;
    return (Floats)(exponent == 0 ? exponent + 0x00400000u : exponent) * 0.5f;
  }
  static constexpr bool has_offset = false;
  Floats offset(int) const { return Floats{}; }
};

// Codes of so many bits one after the other, the lowest bit first, after a scale in float32 and a zero of one byte.
template <int width>
struct Integers : Panel {
  // Codes of 8 bits are used with a sign, smaller by 128.
  static constexpr int bits = width, middle = bits == 8 ? 128 : 0;
  static constexpr int size = 0, bytes = 5, group = 32, largest = middle ? 0 : (1 << bits) - 1, zero = 0;
  void codes(int part, Words* out) const {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      const int word = i * bits / 8, shift = i * bits % 8 * 4;
      Words x = four(5, part * bits + word) >> shift;
      if (shift + 4 * bits > 32) x |= four(5, part * bits + word + 1) << (32 - shift);
      // Two codes into each half, then one into each byte.
      constexpr uint32_t pair = (1u << 2 * bits) - 1, code = (1u << bits) - 1;
      x = (x & pair) | ((x << (16 - 2 * bits)) & pair << 16);
      x = (x & code * 0x00010001u) | ((x << (8 - bits)) & code * 0x01000100u);
      out[i] = middle ? x ^ 0x80808080u : x;
    }
  }
  Floats scale(int) const { return (Floats)four(0, 0); }
  static constexpr bool has_offset = true;
  Floats offset(int group) const { return scale(group) * floats(middle - (from_bytes(one(4)) & 0xff)); }
};

// Each format of floats has
// - size, bytes: as above, where a row of blocks of 1 number is read as one block;
// - bits: of a number, so that 64 bytes of a panel have 32 / bits numbers of a row;
// - group: how many numbers share a scale, or 0 for a block;
// - number(line, i): the i-th number in the `line`-th 64 bytes of a panel's codes, without the scale;
// - scale(group).
// Their products take activations as they are.

template <Floats (*convert)(Halves)>
struct Float16Bits : Panel {
  static constexpr bool exact = true;
  static constexpr int size = 1, bytes = 2, bits = 16, group = 0;
  Floats number(int64_t line, int i) const {
    return convert(load<Halves>(block + 64 * line + 2 * (ROWS * i + LANES * strip)));
  }
  Floats scale(int) const { return Floats{} + 1.0f; }
};

using BF16 = Float16Bits<from_bfloat16>;
using F16 = Float16Bits<from_float16>;

struct INT8 : Panel {
  static constexpr bool exact = true;
  static constexpr int size = 1, bytes = 1, bits = 8, group = 0;
  Floats number(int64_t line, int i) const {
    return floats(from_bytes(block + 64 * line + ROWS * i + LANES * strip));
  }
  Floats scale(int) const { return Floats{} + 1.0f; }
};

struct FP8 : Panel {
  static constexpr bool exact = true;
  static constexpr int size = 1, bytes = 1, bits = 8, group = 0;
  Floats number(int64_t line, int i) const {
    return from_float8(halves_of_bytes(block + 64 * line + ROWS * i + LANES * strip));
  }
  Floats scale(int) const { return Floats{} + FLOAT8_UNIT; }
};

struct FP8InBlocks : Panel {
  static constexpr bool exact = true;
  static constexpr int size = 0, bytes = 4, bits = 8, group = 0;
  Floats number(int64_t line, int i) const {
    return from_float8(__builtin_convertvector(Ints(four(4, int(line)) << (24 - 8 * i)) >> 24, Halves));
  }
  Floats scale(int) const { return (Floats)four(0, 0) * FLOAT8_UNIT; }
};

constexpr float NORMAL_FLOAT4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

struct NF4 : Panel {
  static constexpr bool exact = true;
  static constexpr int size = 0, bytes = 4, bits = 4, group = 0;
  // The first number of a byte has its high bits.
  Floats number(int64_t line, int i) const {
    return looked_up(four(4, int(line)) >> (4 * (i ^ 1)), NORMAL_FLOAT4);
  }
  Floats scale(int) const { return (Floats)four(0, 0); }
};

// Numbers of 8 bits with more exponents for small ones and more fraction for large ones.
struct Dynamic {
  float at[256] = {};
  constexpr Dynamic() {
    double unit = 1e-6;
    for (int exponent = 0, above = 128; exponent < 7; exponent++, unit *= 10)
      for (int i = 0; i < 1 << exponent; i++, above++)
        at[above] = float(unit * (0.1 + 0.9 * (i + 0.5) / (1 << exponent))), at[254 - above] = -at[above];
    at[255] = 1;
  }
};
constexpr Dynamic DYNAMIC;

// A row of codes of NF4, of which each 64 share a scale of 8 bits. Before the codes it has an offset and the factors of
// scales in float32, then the index of the first scale among those with the same factor, and the scales.
struct NF4D : Panel {
  static constexpr bool exact = true;
  static constexpr int size = 0, bytes = 0, bits = 4, group = SCALED;
  Floats number(int64_t line, int i) const {
    return looked_up(four(scale_bytes(numbers / SCALED), int(line)) >> (4 * (i ^ 1)), NORMAL_FLOAT4);
  }
  Floats scale(int group) const {
    const int scales = 4 + 4 * factors_of(numbers / SCALED);
    const Ints place = Ints(byte(scales, 0)) + group;
    Floats factor = (Floats)four(0, 1);
    for (int i = 1; SHARE * i < SHARE + group; i++) factor = place >= SHARE * i ? (Floats)four(0, 1 + i) : factor;
    return gathered(byte(scales, 1 + group), DYNAMIC.at) * factor + (Floats)four(0, 0);
  }
};

constexpr float FLOAT4[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

struct NVFP4 : Panel {
  static constexpr bool exact = true;
  static constexpr int size = 16, bytes = 9, bits = 4, group = 0;
  Floats number(int64_t line, int i) const { return looked_up(four(1, int(line)) >> (4 * i), FLOAT4); }
  Floats scale(int) const { return from_float8(halves_of_bytes(one(0))) * FLOAT8_UNIT; }
};

}  // namespace
