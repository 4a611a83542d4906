// Geometries of convolutions, and the products that they hold.
#pragma once

#include "kernels.h"

namespace fastmaml_test {

inline fastmaml::ConvGeometry conv_geometry(int in, int out, int height, int width, int kh, int kw,
                                            int sh, int sw, int ph, int pw, int dh, int dw) {
  const int oh = (height + 2 * ph - dh * (kh - 1) - 1) / sh + 1;
  const int ow = (width + 2 * pw - dw * (kw - 1) - 1) / sw + 1;
  return {in, out, height, width, oh, ow, kh, kw, sh, sw, ph, pw, dh, dw};
}

// body(output row, input row, tap) for every product the convolution holds.
template <typename Body>
void for_products(const fastmaml::ConvGeometry& g, fastmaml::Index images, Body body) {
  for (fastmaml::Index image = 0; image < images; ++image) {
    for (int out = 0; out < g.out_height * g.out_width; ++out) {
      for (int tap = 0; tap < g.kernel_h * g.kernel_w; ++tap) {
        const int h = out / g.out_width * g.stride_h - g.pad_h + tap / g.kernel_w * g.dilation_h;
        const int w = out % g.out_width * g.stride_w - g.pad_w + tap % g.kernel_w * g.dilation_w;
        if (h < 0 || w < 0 || h >= g.height || w >= g.width) continue;
        body(image * g.out_height * g.out_width + out, (image * g.height + h) * g.width + w, tap);
      }
    }
  }
}

}  // namespace fastmaml_test
