// Products of panels; compiled once for each instruction set.
#include "panels.h"

#include <algorithm>

#include "formats.h"

namespace {

// So many rows of activations at a time, as many as there are registers for their sums.
constexpr int AT_ONCE = LANES == 16 ? 8 : 4;
constexpr int STRIPS = ROWS / LANES;
// Bytes ahead of the ones in use, that are fetched from memory.
constexpr int AHEAD = 8192;

inline void fetch(const uint8_t* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + AHEAD + at);
}

template <class F>
constexpr int zero_of() { return F::largest ? F::zero : SIGNED_ZERO; }

template <class F, int count>
inline Ints dot_of(const Words* codes, const int8_t* x) {
  if constexpr (F::largest) return dot<F::largest, count>(codes, x);
  else return dot_signed<count>(codes, x);
}

// Numbers and bytes of a block.
template <class F>
int64_t size_of(const Format& format) { return F::size ? F::size : format.size; }
template <class F>
int64_t bytes_of(const Format& format) { return F::size ? F::bytes : format.bytes; }

template <class F, int rows>
void product_of_codes(const Format& format, const uint8_t* panel, const Activations& x, int64_t row, float* y,
                      int64_t stride) {
  const int64_t parts = size_of<F>(format) / 32, bytes = bytes_of<F>(format), blocks = x.inputs / 32 / parts;
  Floats total[STRIPS][rows] = {};
  // What is read is fetched bit by bit: all of a large block at once would be more than a core waits for.
  const int64_t share = ROWS * bytes / (parts * STRIPS);
  for (int64_t block = 0; block < blocks; block++, panel += ROWS * bytes)
    for (int strip = 0; strip < STRIPS; strip++) {
      const int8_t* codes = x.codes + row * x.inputs * 2;
      const float *scales = x.scales + row * (x.inputs / 32), *sums = x.sums + row * (x.inputs / 16);
      // Hides that each strip reads the same activations: a compiler keeps them for the next one, where no register is left.
      asm volatile("" : "+r"(codes), "+r"(scales), "+r"(sums));
      F f;
      f.block = panel, f.strip = strip;
      Floats own[rows];
      for (int m = 0; m < rows; m++) own[m] = total[strip][m];
      const auto add = [&](int part) __attribute__((always_inline)) {
        fetch(panel + (strip * parts + part) * share, share);
        const int64_t at = block * parts + part;
        Words w[8];
        f.codes(part, w);
        constexpr int groups = 32 / F::group, count = 8 / groups;
        for (int g = 0; g < groups; g++) {
          const Floats scale = f.scale(part * groups + g);
          const Floats offset = f.offset(part * groups + g) - scale * float(zero_of<F>());
          for (int m = 0; m < rows; m++) {
            const int8_t* first = codes + (m * x.inputs + at * 32) * 2 + g * F::group;
            const float* sum = sums + m * (x.inputs / 16) + at * 2 + g;
            const float all = groups == 2 ? sum[0] : sum[0] + sum[1];
            const float factor = scales[m * (x.inputs / 32) + at];
            const Floats products = floats(dot_of<F, count>(w + g * count, first)) +
                                    floats(dot_of<F, count>(w + g * count, first + 32)) * (1 / FINER);
            own[m] += products * (scale * factor);
            if constexpr (zero_of<F>() != 0 || F::has_offset) own[m] += offset * all;
          }
        }
      };
      // With known parts, what they share is unpacked once.
      if constexpr (F::size) {
#pragma GCC unroll 8
        for (int part = 0; part < F::size / 32; part++) add(part);
      } else
        for (int part = 0; part < parts; part++) add(part);
      for (int m = 0; m < rows; m++) total[strip][m] = own[m];
    }
  for (int m = 0; m < rows; m++)
    for (int strip = 0; strip < STRIPS; strip++)
      std::memcpy(y + (row + m) * stride + strip * LANES, &total[strip][m], sizeof(Floats));
}

// Numbers that 64 bytes of a panel have of each row.
template <class F>
constexpr int LINE = 32 / F::bits;

// Weights and activations as floats: no code of activations, and no error but that of the sum.
template <class F, int rows>
void product_of_floats(const Format& format, const uint8_t* panel, const Activations& x, int64_t row, float* y,
                       int64_t stride) {
  const int64_t size = F::size == 1 ? x.inputs : size_of<F>(format), bytes = bytes_of<F>(format);
  const int64_t group = F::group ? F::group : size, lines = group / LINE<F>;
  const float* numbers = x.numbers + row * x.inputs;
  Floats total[STRIPS][rows] = {};
  F f;
  f.block = panel, f.numbers = int(size);
  for (int64_t from = 0; from < x.inputs; from += size, f.block += ROWS * bytes)
    for (int64_t at = 0; at < size / group; at++) {
      Floats sums[STRIPS][rows][2] = {};
      const auto add = [&](int64_t line, int count) __attribute__((always_inline)) {
        __builtin_prefetch(f.block + 64 * line + AHEAD);
#pragma GCC unroll 8
        for (int i = 0; i < count; i++)
          for (int strip = 0; strip < STRIPS; strip++) {
            f.strip = strip;
            const Floats w = f.number(line, i);
            for (int m = 0; m < rows; m++)
              sums[strip][m][i % 2] += w * numbers[m * x.inputs + from + line * LINE<F> + i];
          }
      };
      for (int64_t line = at * lines; line < (at + 1) * lines; line++) add(line, LINE<F>);
      if (group % LINE<F>) add(lines, int(group % LINE<F>));
      for (int strip = 0; strip < STRIPS; strip++) {
        f.strip = strip;
        const Floats scale = f.scale(int(at));
        for (int m = 0; m < rows; m++) total[strip][m] += (sums[strip][m][0] + sums[strip][m][1]) * scale;
      }
    }
  for (int m = 0; m < rows; m++)
    for (int strip = 0; strip < STRIPS; strip++)
      std::memcpy(y + (row + m) * stride + strip * LANES, &total[strip][m], sizeof(Floats));
}

// The numbers of inputs `from` to `to`, into out[input][row].
template <class F>
void dequantize_codes(const Format& format, const uint8_t* panel, int64_t from, int64_t to, float* out) {
  const int64_t size = size_of<F>(format), bytes = bytes_of<F>(format);
  for (int64_t at = from; at < to; at += 32, out += 32 * ROWS)
    for (int strip = 0; strip < STRIPS; strip++) {
      F f;
      f.block = panel + at / size * ROWS * bytes, f.strip = strip;
      const int part = int(at % size / 32);
      Words w[8];
      f.codes(part, w);
      for (int i = 0; i < 8; i++) {
        const int group = (32 * part + 4 * i) / F::group;
        const Floats scale = f.scale(group), offset = f.offset(group) - scale * float(F::largest ? F::zero : 0);
        for (int byte = 0; byte < 4; byte++) {
          const Words code = w[i] << (24 - 8 * byte);
          const Floats number = (F::largest ? floats(code >> 24) : floats((Ints)code >> 24)) * scale + offset;
          std::memcpy(out + (4 * i + byte) * ROWS + strip * LANES, &number, sizeof number);
        }
      }
    }
}

template <class F>
void dequantize_floats(const Format& format, const uint8_t* panel, int64_t from, int64_t to, float* out) {
  const int64_t size = F::size == 1 ? to : size_of<F>(format), bytes = bytes_of<F>(format);
  const int64_t group = F::group ? F::group : size;
  for (int64_t at = from; at < to; at += LINE<F>)
    for (int strip = 0; strip < STRIPS; strip++) {
      F f;
      f.block = panel + at / size * ROWS * bytes, f.strip = strip, f.numbers = int(size);
      const Floats scale = f.scale(int(at % size / group));
      for (int i = 0; i < std::min<int64_t>(LINE<F>, to - at); i++) {
        const Floats number = f.number(at % size / LINE<F>, i) * scale;
        std::memcpy(out + (at - from + i) * ROWS + strip * LANES, &number, sizeof number);
      }
    }
}

// So many rows that their sums stay in registers.
constexpr int TILE = LANES == 16 ? 16 : LANES == 8 ? 6 : 5;

void arrange(const Activations& x, int64_t tile) {
  const int64_t from = tile * TILE, rows = std::min<int64_t>(TILE, x.rows - from);
  float* out = x.tiles + from * x.inputs;
  for (int64_t k = 0; k < x.inputs; k++)
    for (int m = 0; m < TILE; m++) out[k * TILE + m] = m < rows ? x.numbers[(from + m) * x.inputs + k] : 0;
}

// The products of a tile and `count` inputs of a panel, whose numbers stand in weights[input][row]. It is not inlined: beside
// the sums there is a register for everything here, and for nothing else.
__attribute__((noinline)) void multiply_tile(const float* weights, const float* tile, int64_t count, int64_t rows,
                                             bool first, float* y, int64_t stride) {
  Floats total[STRIPS][TILE] = {};
  for (int64_t k = 0; k < count; k++) {
    Floats w[STRIPS];
#pragma GCC unroll 4
    for (int strip = 0; strip < STRIPS; strip++) w[strip] = load<Floats>(weights + k * ROWS + strip * LANES);
#pragma GCC unroll 16
    for (int m = 0; m < TILE; m++)
#pragma GCC unroll 4
      for (int strip = 0; strip < STRIPS; strip++) total[strip][m] += w[strip] * tile[k * TILE + m];
  }
  for (int64_t m = 0; m < rows; m++)
    for (int strip = 0; strip < STRIPS; strip++) {
      float* at = y + m * stride + strip * LANES;
      const Floats sum = first ? total[strip][m] : load<Floats>(at) + total[strip][m];
      std::memcpy(at, &sum, sizeof sum);
    }
}

#if defined(PAIRS)

// Two panels at a time share each load of activations. So many rows that their sums of codes and of numbers stay in registers.
constexpr int TOGETHER = 2, PAIR_TILE = 6;

// A stretch of a panel: two neighbouring codes of each row in 16 bits a lane, and the scale and offset of each 16 or 32.
struct Unpacked {
  Words pairs[STRETCH / 2];
  Floats scales[STRETCH / 16], offsets[STRETCH / 16];
};

template <class F>
void unpack(const Format& format, const uint8_t* panel, int64_t from, int64_t to, Unpacked& out) {
  const int64_t size = size_of<F>(format), bytes = bytes_of<F>(format);
  constexpr int groups = 32 / F::group;
  for (int64_t at = from, part = 0; at < to; at += 32, part++) {
    F f;
    f.block = panel + at / size * ROWS * bytes, f.strip = 0;
    const int own = int(at % size / 32);
    Words w[8];
    f.codes(own, w);
    for (int i = 0; i < 16; i++) {
      const Words two = i % 2 ? w[i / 2] >> 16 : w[i / 2];
      const Shorts apart = (Shorts)((two & 0xffu) | (two & 0xff00u) << 8);
      out.pairs[part * 16 + i] = (Words)(F::largest ? apart - int16_t(F::zero) : apart << 8 >> 8);
    }
    for (int g = 0; g < groups; g++) {
      out.scales[part * groups + g] = f.scale(own * groups + g);
      if constexpr (F::has_offset) out.offsets[part * groups + g] = f.offset(own * groups + g);
    }
  }
}

// Adds the products of a stretch of `parts` times 32 inputs and the rows of a tile, whose codes, scales and sums for it are
// given, to the results of each panel; or begins with them.
template <int groups, bool has_offset>
__attribute__((noinline)) void multiply_pairs(const Unpacked* w, const int32_t* pairs, const float* scales, const float* sums,
                                              int64_t parts, int64_t rows, bool first, float* const* y, int64_t stride) {
  Floats total[TOGETHER][PAIR_TILE];
  for (int p = 0; p < TOGETHER; p++)
    for (int m = 0; m < PAIR_TILE; m++) total[p][m] = first || m >= rows ? Floats{} : load<Floats>(y[p] + m * stride);
  constexpr int own = 16 / groups;
  for (int64_t group = 0; group < parts * groups; group++) {
    Ints products[TOGETHER][PAIR_TILE] = {};
#pragma GCC unroll 4
    for (int i = 0; i < own; i++)
#pragma GCC unroll 8
      for (int m = 0; m < PAIR_TILE; m++)
#pragma GCC unroll 2
        for (int p = 0; p < TOGETHER; p++)
          products[p][m] = dot_pairs(products[p][m], w[p].pairs[group * own + i], pairs[(group * own + i) * PAIR_TILE + m]);
#pragma GCC unroll 8
    for (int m = 0; m < PAIR_TILE; m++) {
      const float* sum = sums + group * (2 / groups) * PAIR_TILE + m;
      const float scale = scales[group / groups * PAIR_TILE + m], all = groups == 2 ? sum[0] : sum[0] + sum[PAIR_TILE];
#pragma GCC unroll 2
      for (int p = 0; p < TOGETHER; p++) {
        total[p][m] += floats(products[p][m]) * (w[p].scales[group] * scale);
        if constexpr (has_offset) total[p][m] += w[p].offsets[group] * all;
      }
    }
  }
  for (int p = 0; p < TOGETHER; p++)
    for (int m = 0; m < PAIR_TILE && m < rows; m++) std::memcpy(y[p] + m * stride, &total[p][m], sizeof total[p][m]);
}

template <class F>
void product_of_many_codes(const Format& format, const uint8_t* panels, int64_t bytes, int64_t count, const Activations& x,
                           float* y, int64_t stride) {
  Unpacked w[TOGETHER];
  for (int64_t panel = 0; panel < count; panel += TOGETHER) {
    // An odd last panel is multiplied twice, with the same results.
    const int64_t own[TOGETHER] = {panel, std::min(panel + 1, count - 1)};
    for (int64_t from = 0; from < x.inputs; from += STRETCH) {
      const int64_t to = std::min(x.inputs, from + STRETCH);
      for (int p = 0; p < TOGETHER; p++) unpack<F>(format, panels + own[p] * bytes, from, to, w[p]);
      for (int64_t row = 0; row < x.rows; row += PAIR_TILE) {
        float* const results[TOGETHER] = {y + row * stride + own[0] * ROWS, y + row * stride + own[1] * ROWS};
        multiply_pairs<32 / F::group, F::has_offset>(
            w, x.pairs + row * x.inputs / 2 + from / 2 * PAIR_TILE,
            x.pair_scales + row * (x.inputs / 32) + from / 32 * PAIR_TILE,
            x.pair_sums + row * (x.inputs / 16) + from / 16 * PAIR_TILE, (to - from) / 32,
            std::min<int64_t>(PAIR_TILE, x.rows - row), from == 0, results, stride);
      }
    }
  }
}

void arrange_pairs(const Activations& x, int64_t tile) {
  const int64_t from = tile * PAIR_TILE, rows = std::min<int64_t>(PAIR_TILE, x.rows - from), parts = x.inputs / 32;
  int32_t* pairs = x.pairs + from * x.inputs / 2;
  float *scales = x.pair_scales + from * parts, *sums = x.pair_sums + from * parts * 2;
  for (int64_t part = 0; part < parts; part++)
    for (int64_t m = 0; m < PAIR_TILE; m++) {
      const bool is = m < rows;
      const int8_t* codes = x.codes + ((from + m) * parts + part) * 64;
      for (int i = 0; i < 16; i++) {
        int16_t two[2] = {};
        for (int j = 0; j < 2 && is; j++) two[j] = int16_t(codes[2 * i + j] * int(FINER) + codes[32 + 2 * i + j]);
        pairs[(part * 16 + i) * PAIR_TILE + m] = load<int32_t>(two);
      }
      scales[part * PAIR_TILE + m] = is ? x.scales[(from + m) * parts + part] * (1 / FINER) : 0;
      for (int half = 0; half < 2; half++)
        sums[(part * 2 + half) * PAIR_TILE + m] = is ? x.sums[((from + m) * parts + part) * 2 + half] : 0;
    }
}

#else

constexpr int PAIR_TILE = 0;
constexpr void (*arrange_pairs)(const Activations& x, int64_t tile) = nullptr;

#endif

template <class F>
void product_of_many_numbers(const Format& format, const uint8_t* panel, const Activations& x, float* y, int64_t stride) {
  alignas(64) float weights[STRETCH * ROWS];
  for (int64_t from = 0; from < x.inputs; from += STRETCH) {
    const int64_t count = std::min(STRETCH, x.inputs - from);
    if constexpr (F::exact) dequantize_floats<F>(format, panel, from, from + count, weights);
    else dequantize_codes<F>(format, panel, from, from + count, weights);
    for (int64_t row = 0; row < x.rows; row += TILE)
      multiply_tile(weights, x.tiles + row * x.inputs + from * TILE, count, std::min<int64_t>(TILE, x.rows - row), from == 0,
                    y + row * stride, stride);
  }
}

template <class F>
void product_of_many(const Format& format, const uint8_t* panels, int64_t bytes, int64_t count, const Activations& x, float* y,
                     int64_t stride) {
#if defined(PAIRS)
  if constexpr (!F::exact) product_of_many_codes<F>(format, panels, bytes, count, x, y, stride);
  else
#endif
    for (int64_t panel = 0; panel < count; panel++)
      product_of_many_numbers<F>(format, panels + panel * bytes, x, y + panel * ROWS, stride);
}

template <class F, int rows>
void product_of_rows(const Format& format, const uint8_t* panel, const Activations& x, int64_t row, float* y,
                     int64_t stride) {
  if constexpr (F::exact) product_of_floats<F, rows>(format, panel, x, row, y, stride);
  else product_of_codes<F, rows>(format, panel, x, row, y, stride);
}

template <class F>
void product(const Format& format, const uint8_t* panel, const Activations& x, int64_t from, int64_t to, float* y,
             int64_t stride) {
  for (int64_t row = from; row < to;) {
    switch (std::min<int64_t>(to - row, AT_ONCE)) {
      case 1: product_of_rows<F, 1>(format, panel, x, row, y, stride), row += 1; break;
      case 2: product_of_rows<F, 2>(format, panel, x, row, y, stride), row += 2; break;
      case 3: product_of_rows<F, 3>(format, panel, x, row, y, stride), row += 3; break;
      case 4: case 5: case 6: case 7: product_of_rows<F, 4>(format, panel, x, row, y, stride), row += 4; break;
      default: product_of_rows<F, AT_ONCE>(format, panel, x, row, y, stride), row += AT_ONCE;
    }
  }
}

inline uint32_t largest_of(Words x) {
  uint32_t lanes[LANES], largest = 0;
  std::memcpy(lanes, &x, sizeof x);
  for (uint32_t lane : lanes) largest = std::max(largest, lane);
  return largest;
}

void quantize(const Activations& x, int64_t row) {
  const float* numbers = x.numbers + row * x.inputs;
  for (int64_t part = 0; part < x.inputs / 32; part++, numbers += 32) {
    // Without their signs, floats have the order of their bits, and NaN is above all: it becomes the scale.
    Words sizes = {};
    for (int i = 0; i < 32; i += LANES) {
      const Words size = load<Words>(numbers + i) & 0x7fffffffu;
      sizes = size > sizes ? size : sizes;
    }
    const uint32_t bits = largest_of(sizes);
    const float largest = load<float>(&bits);
    const float scale = largest / 127, inverse = largest > 1e-30f ? 127 / largest : 0;
    int8_t* codes = x.codes + (row * x.inputs + part * 32) * 2;
    for (int half = 0; half < 2; half++) {
      int32_t first[16], second[16], sum_first = 0, sum_second = 0;
      for (int i = 0; i < 16; i += LANES) {
        const Floats steps = load<Floats>(numbers + 16 * half + i) * inverse;
        const Ints code = rounded(steps), finer = rounded((steps - floats(code)) * FINER);
        std::memcpy(first + i, &code, sizeof code), std::memcpy(second + i, &finer, sizeof finer);
      }
      for (int i = 0; i < 16; i++) {
        codes[16 * half + i] = int8_t(first[i]), codes[32 + 16 * half + i] = int8_t(second[i]);
        sum_first += first[i], sum_second += second[i];
      }
      x.sums[(row * (x.inputs / 32) + part) * 2 + half] = scale * (float(sum_first) + float(sum_second) * (1 / FINER));
    }
    x.scales[row * (x.inputs / 32) + part] = scale;
  }
}

template <class F>
constexpr int scaled_group() { return F::exact ? F::group : 0; }
#define NAMED(name, F) {name, F::size, F::bytes, F::bits, scaled_group<F>(), F::exact, product<F>, product_of_many<F>}
#define BLOCKS(F) NAMED(#F, F)
constexpr Format FORMATS[] = {
    BLOCKS(Q4_0), BLOCKS(Q4_1), BLOCKS(Q5_0), BLOCKS(Q5_1), BLOCKS(Q8_0), BLOCKS(Q2_K), BLOCKS(Q3_K), BLOCKS(Q4_K),
    BLOCKS(Q5_K), BLOCKS(Q6_K), BLOCKS(IQ4_NL), BLOCKS(IQ4_XS), BLOCKS(MXFP4), BLOCKS(BF16), BLOCKS(F16),
    BLOCKS(INT8), BLOCKS(FP8), BLOCKS(NVFP4), NAMED("NF4/", NF4), NAMED("NF4D/", NF4D),
    NAMED("FP8/", FP8InBlocks), NAMED("INT2/", Integers<2>), NAMED("INT3/", Integers<3>), NAMED("INT4/", Integers<4>), NAMED("INT5/", Integers<5>),
    NAMED("INT6/", Integers<6>), NAMED("INT7/", Integers<7>), NAMED("INT8/", Integers<8>),
};

}  // namespace

#define TEXT(x) #x
#define NAME(x) TEXT(x)
namespace SET {
const Instructions instructions = {NAME(SET), FORMATS, int(sizeof FORMATS / sizeof *FORMATS), quantize,
                                   TILE,       arrange, PAIR_TILE,                            arrange_pairs};
}
