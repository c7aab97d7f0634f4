// Random bytes as panels, of random shapes, each in a buffer of exactly its size: AddressSanitizer reports any read or
// write beyond it, and UndefinedBehaviorSanitizer what the language does not define.
#include <cstdio>
#include <cstdlib>
#include <chrono>
#include <memory>
#include <random>

#include "panels.h"

#if defined(__AVX512VNNI__)
#define SET avx512
#elif defined(__AVX2__)
#define SET avx2
#else
#define SET neon
#endif

int main(int, char** arguments) {
  const double seconds = std::atof(arguments[1]);
  std::mt19937 draw(std::atoi(arguments[2]));
  const auto below = [&](int limit) { return int(draw() % unsigned(limit)); };
  const auto start = std::chrono::steady_clock::now();
  long products = 0;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
    const Format& format = SET.formats[below(SET.count)];
    const int blocks = format.size == 1 ? 1 + below(300) : 1 + below(5);
    const int64_t inputs = int64_t(blocks) * format.size, rows = 1 + below(19), bytes = 16 * int64_t(format.bytes) * blocks;
    const std::unique_ptr<uint8_t[]> panel(new uint8_t[bytes]);
    for (int64_t i = 0; i < bytes; i++) panel[i] = uint8_t(draw());
    const std::unique_ptr<float[]> x(new float[rows * inputs]), y(new float[rows * 16]);
    const float scale = below(10) ? 1 : 1e30f;
    for (int64_t i = 0; i < rows * inputs; i++) x[i] = below(20) ? scale * (float(draw()) / 2e9f - 1) : 0;
    const std::unique_ptr<int8_t[]> codes(new int8_t[rows * inputs * 2]);
    const std::unique_ptr<float[]> scales(new float[rows * (inputs / 32)]), sums(new float[rows * (inputs / 16)]);
    const Activations activations{x.get(), codes.get(), scales.get(), sums.get(), rows, inputs};
    for (int64_t row = 0; row < rows && !format.exact; row++) SET.quantize(activations, row);
    format.product(panel.get(), activations, 0, rows, y.get(), 16);
    products++;
  }
  std::printf("%ld products\n", products);
}
