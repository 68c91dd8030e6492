/* siman.h and the library from plain C, as somebody who has only the archive uses them: one convolution against plain
   loops. Prints the variant that ran. */
#include <siman.h>
#include <stdio.h>

enum { CHANNELS = 70, FILTERS = 5, SIDE = 6, BYTES = (CHANNELS + 7) / 8, PIXELS = SIDE * SIDE };

static float x[CHANNELS][SIDE][SIDE], y[FILTERS][SIDE][SIDE];
static uint8_t weights[FILTERS][3][3][BYTES];

static void fill(void) {
  uint32_t state = 1;
  for (size_t i = 0; i < sizeof(x) / sizeof(float); ++i) {
    state = state * 1664525u + 1013904223u;
    (&x[0][0][0])[i] = (float)(int32_t)state;
  }
  for (int tap = 0; tap < FILTERS * 9; ++tap) {
    for (int c = 0; c < CHANNELS; ++c) {
      state = state * 1664525u + 1013904223u;
      (&weights[0][0][0][0])[tap * BYTES + c / 8] |= (uint8_t)((state >> 31) << c % 8);
    }
  }
}

static float expected(int o, int row, int column) {
  int acc = 0;
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) {
      const int in_row = row - 1 + i, in_column = column - 1 + j;
      if (in_row < 0 || in_row >= SIDE || in_column < 0 || in_column >= SIDE) continue;
      for (int c = 0; c < CHANNELS; ++c) {
        const int one = weights[o][i][j][c / 8] >> c % 8 & 1, positive = x[c][in_row][in_column] >= 0;
        acc += one == positive ? 1 : -1;
      }
    }
  }
  return 0.5f * (float)acc + 1.0f;
}

static int check(siman_status status) {
  if (status != SIMAN_OK) fprintf(stderr, "%s\n", siman_message(status));
  return status == SIMAN_OK;
}

int main(void) {
  const siman_geometry geometry = {FILTERS, {3, 3}, CHANNELS, {1, 1}, {1, 1, 1, 1}, {1, 1}, 1, 0};
  const int64_t image[4] = {1, CHANNELS, SIDE, SIDE};
  const float scale[FILTERS] = {0.5f, 0.5f, 0.5f, 0.5f, 0.5f}, ones[FILTERS] = {1, 1, 1, 1, 1}, no_residual = 0;
  siman_conv* conv = NULL;
  int wrong = 0;
  fill();
  if (!check(siman_create(&geometry, &weights[0][0][0][0], sizeof(weights), scale, ones, ones, NULL, &conv))) return 1;
  if (!check(siman_run(conv, &x[0][0][0], image, &no_residual, 0, &y[0][0][0], NULL, NULL))) return 1;
  for (int o = 0; o < FILTERS; ++o)
    for (int at = 0; at < PIXELS; ++at) wrong += y[o][at / SIDE][at % SIDE] != expected(o, at / SIDE, at % SIDE);
  printf("%s: %d of %d outputs are wrong\n", siman_variant(conv), wrong, FILTERS * PIXELS);
  siman_destroy(conv);
  return wrong != 0;
}
