// Arranges the blocks of 16 rows side by side, as formats.h says; compiled once, for any processor.
#include <cstdint>
#include <cstring>

namespace {

constexpr int ROWS = 16;

// The units of one field, each of all rows.
template <int size>
void arrange_field(const uint8_t* block, int64_t row_bytes, int64_t count, uint8_t* panel) {
  for (int64_t at = 0; at < count; at++, block += size)
    for (int row = 0; row < ROWS; row++, panel += size) std::memcpy(panel, block + row * row_bytes, size);
}

}  // namespace

// - rows: `panels` times 16 rows of `blocks` blocks of `bytes` bytes;
// - sizes: those of the `fields` fields of a block, in bytes: 1, 2, or a multiple of 4.
// Returns whether the sizes are such, and add up to a block; otherwise nothing is written.
extern "C" int mistral_eqx_arrange(const uint8_t* rows, uint8_t* out, int64_t panels, int64_t blocks, int64_t bytes,
                                   const int64_t* sizes, int64_t fields) {
  int64_t sum = 0;
  for (int64_t i = 0; i < fields; i++) {
    if (sizes[i] < 1 || (sizes[i] > 2 && sizes[i] % 4)) return 0;
    sum += sizes[i];
  }
  if (sum != bytes || panels < 0 || blocks < 0) return 0;
  const int64_t row_bytes = blocks * bytes;
  for (int64_t panel = 0; panel < panels; panel++, rows += ROWS * row_bytes)
    for (int64_t block = 0; block < blocks; block++) {
      const uint8_t* from = rows + block * bytes;
      for (int64_t i = 0; i < fields; from += sizes[i], out += ROWS * sizes[i], i++) {
        if (sizes[i] == 1) arrange_field<1>(from, row_bytes, 1, out);
        else if (sizes[i] == 2) arrange_field<2>(from, row_bytes, 1, out);
        else arrange_field<4>(from, row_bytes, sizes[i] / 4, out);
      }
    }
  return 1;
}
