// Random bytes as weights, panels, keys and values, of random shapes, each in a buffer of exactly its size: AddressSanitizer reports any read or
// write beyond it, and UndefinedBehaviorSanitizer what the language does not define.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <chrono>
#include <memory>
#include <random>

#include "attend.h"
#include "dense.h"
#include "lanes.h"
#include "panels.h"

// Random queries, keys and values in each precision.
void attend(std::mt19937& draw) {
  const auto below = [&](int limit) { return int64_t(draw() % unsigned(limit)); };
  Attention a{};
  a.batch = 1 + below(2), a.seq = 1 + below(3), a.kv_heads = 1 + below(3), a.group = 1 + below(6);
  a.slots = 1 + below(600), a.head_dim = 16 * (1 + below(9)), a.scale = 0.1f;
  const int64_t numbers = a.batch * a.kv_heads * a.slots * a.head_dim, queries = a.batch * a.seq * a.kv_heads * a.group;
  const std::unique_ptr<float[]> q(new float[queries * a.head_dim]), parts(new float[a.parts_size()]);
  const std::unique_ptr<uint8_t[]> mask(new uint8_t[a.batch * a.seq * a.slots]);
  for (int64_t i = 0; i < queries * a.head_dim; i++) q[i] = float(draw()) / 2e9f - 1;
  for (int64_t i = 0; i < a.batch * a.seq * a.slots; i++) mask[i] = below(4) != 0;
  const std::unique_ptr<float[]> scales(new float[a.batch * a.kv_heads * a.slots]);
  std::fill_n(scales.get(), a.batch * a.kv_heads * a.slots, 0.5f);
  a.k_scales = scales.get(), a.v_scales = scales.get();
  const auto with = [&](int bytes, auto part) {
    const std::unique_ptr<uint8_t[]> k(new uint8_t[numbers * bytes]), v(new uint8_t[numbers * bytes]);
    for (int64_t i = 0; i < numbers * bytes; i++) k[i] = uint8_t(draw()), v[i] = uint8_t(draw());
    a.q = q.get(), a.k = k.get(), a.v = v.get(), a.mask = mask.get();
    for (int64_t unit = 0; unit < a.batch * a.kv_heads * a.ranges(); unit++) part(a, unit, parts.get());
  };
  with(4, SET::attending.float32), with(2, SET::attending.bfloat16), with(2, SET::attending.float16);
  with(1, SET::attending.int8), with(1, SET::attending.float8);
}

// A random weight in each precision.
void multiply(std::mt19937& draw) {
  const auto below = [&](int limit) { return int64_t(draw() % unsigned(limit)); };
  Product p{};
  p.rows = 1 + below(FEW_ROWS), p.inputs = 1 + below(200), p.outputs = 1 + below(40);
  const std::unique_ptr<float[]> x(new float[p.rows * p.inputs]), y(new float[p.rows * p.outputs]);
  for (int64_t i = 0; i < p.rows * p.inputs; i++) x[i] = float(draw()) / 2e9f - 1;
  const auto with = [&](int bytes, auto part) {
    const std::unique_ptr<uint8_t[]> w(new uint8_t[p.outputs * p.inputs * bytes]);
    for (int64_t i = 0; i < p.outputs * p.inputs * bytes; i++) w[i] = uint8_t(draw());
    p.x = x.get(), p.w = w.get(), p.y = y.get();
    const int64_t middle = below(int(p.outputs));
    part(p, 0, middle), part(p, middle, p.outputs);
  };
  with(4, SET::multiplying.float32), with(2, SET::multiplying.bfloat16), with(2, SET::multiplying.float16);
}

void call(std::mt19937& draw);  // fuzz_calls.cc

int main(int, char** arguments) {
  const double seconds = std::atof(arguments[1]);
  std::mt19937 draw(std::atoi(arguments[2]));
  const auto below = [&](int limit) { return int(draw() % unsigned(limit)); };
  const auto start = std::chrono::steady_clock::now();
  long products = 0;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
    Format format = SET::instructions.formats[below(SET::instructions.count)];
    if (format.size == 0) format = format.of_size(format.step() * (1 + below(10)));
    const int blocks = format.size == 1 ? 1 + below(300) : 1 + below(5);
    const int64_t inputs = int64_t(blocks) * format.size, rows = 1 + below(19), bytes = 16 * int64_t(format.bytes) * blocks;
    const int64_t panels = 1 + below(3);
    const std::unique_ptr<uint8_t[]> panel(new uint8_t[panels * bytes]);
    for (int64_t i = 0; i < panels * bytes; i++) panel[i] = uint8_t(draw());
    const std::unique_ptr<float[]> x(new float[rows * inputs]), y(new float[rows * 16 * panels]);
    const float scale = below(10) ? 1 : 1e30f;
    for (int64_t i = 0; i < rows * inputs; i++) x[i] = below(20) ? scale * (float(draw()) / 2e9f - 1) : 0;
    const std::unique_ptr<int8_t[]> codes(new int8_t[rows * inputs * 2]);
    const std::unique_ptr<float[]> scales(new float[rows * (inputs / 32)]), sums(new float[rows * (inputs / 16)]);
    const auto& set = SET::instructions;
    const int64_t tile = set.tile, count = (rows + tile - 1) / tile;
    const std::unique_ptr<float[]> tiles(new float[count * tile * inputs]);
    Activations activations{};
    activations.numbers = x.get(), activations.codes = codes.get(), activations.scales = scales.get();
    activations.sums = sums.get(), activations.tiles = tiles.get(), activations.rows = rows, activations.inputs = inputs;
    for (int64_t i = 0; i < count; i++) set.arrange(activations, i);
    for (int64_t row = 0; row < rows && !format.exact; row++) set.quantize(activations, row);
    const int64_t pair_count = set.pair_tile ? (rows + set.pair_tile - 1) / set.pair_tile : 0, all = pair_count * set.pair_tile;
    const std::unique_ptr<int32_t[]> pairs(new int32_t[all * inputs / 2]);
    const std::unique_ptr<float[]> pair_scales(new float[all * (inputs / 32)]), pair_sums(new float[all * (inputs / 16)]);
    activations.pairs = pairs.get(), activations.pair_scales = pair_scales.get(), activations.pair_sums = pair_sums.get();
    for (int64_t i = 0; i < pair_count && !format.exact; i++) set.arrange_pairs(activations, i);
    for (int64_t i = 0; i < panels; i++)
      format.product(format, panel.get() + i * bytes, activations, 0, rows, y.get() + 16 * i, 16 * panels);
    format.product_of_many(format, panel.get(), bytes, panels, activations, y.get(), 16 * panels);
    products++;
    attend(draw), multiply(draw), call(draw);
  }
  std::printf("%ld products\n", products);
}
