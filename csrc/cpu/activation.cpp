#include "activation.h"

#include "vector_math.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

template <typename T>
FASTMAML_INLINE Vec<T> constant(double x) {
  return broadcast(static_cast<T>(x));
}

// Each function gives value f(x), slope f'(x) and curvature f''(x). At a kink the slope is the one
// PyTorch takes.

template <typename T>
struct LeakyRelu {  // relu: alpha = 0
  Vec<T> alpha;
  Vec<T> value(Vec<T> x) const { return select<T>(x <= Vec<T>{}, alpha * x, x); }
  Vec<T> slope(Vec<T> x) const { return select<T>(x > Vec<T>{}, constant<T>(1), alpha); }
  Vec<T> curvature(Vec<T>) const { return Vec<T>{}; }
};

template <typename T>
struct Elu {  // scale * x above zero, alpha * (exp(rate * x) - 1) below
  Vec<T> alpha, rate, scale;
  Vec<T> value(Vec<T> x) const {
    const Vec<T> low = select<T>(x > Vec<T>{}, Vec<T>{}, rate * x);
    return select<T>(x > Vec<T>{}, scale * x, alpha * vector_expm1<T>(low));
  }
  Vec<T> slope(Vec<T> x) const {
    return select<T>(x > Vec<T>{}, scale, alpha * rate * vector_exp<T>(rate * x));
  }
  Vec<T> curvature(Vec<T> x) const {
    return select<T>(x > Vec<T>{}, Vec<T>{}, alpha * rate * rate * vector_exp<T>(rate * x));
  }
};

template <typename T>
struct Gelu {
  struct Normal {
    Vec<T> cumulative, density;
  };
  static Normal normal(Vec<T> x) {
    const Vec<T> bell = vector_gaussian<T>(x);
    const Vec<T> scaled = vector_erfcx<T>(constant<T>(0.70710678118654752440) * absolute<T>(x));
    const Vec<T> beyond = constant<T>(0.5) * scaled * bell;
    return {select<T>(x < Vec<T>{}, beyond, constant<T>(1) - beyond),
            constant<T>(0.39894228040143267794) * bell};
  }
  Vec<T> value(Vec<T> x) const { return x * normal(x).cumulative; }
  Vec<T> slope(Vec<T> x) const {
    const Normal n = normal(x);
    return fma(x, n.density, n.cumulative);
  }
  Vec<T> curvature(Vec<T> x) const { return normal(x).density * (constant<T>(2) - x * x); }
};

template <typename T>
struct GeluTanh {  // x (1 + tanh u) / 2, u = k (x + c x^3)
  static Vec<T> k() { return constant<T>(0.79788456080286535588); }
  static Vec<T> c() { return constant<T>(0.044715); }
  static Vec<T> u(Vec<T> x) { return k() * fma(c() * x, x * x, x); }
  static Vec<T> du(Vec<T> x) { return k() * fma(constant<T>(3) * c() * x, x, constant<T>(1)); }
  Vec<T> value(Vec<T> x) const {
    return constant<T>(0.5) * x * (constant<T>(1) + vector_tanh<T>(u(x)));
  }
  Vec<T> slope(Vec<T> x) const {
    const Vec<T> sum = constant<T>(1) + vector_tanh<T>(u(x));
    return constant<T>(0.5) * fma(x * vector_tanh_slope<T>(u(x)), du(x), sum);
  }
  Vec<T> curvature(Vec<T> x) const {
    const Vec<T> t = vector_tanh<T>(u(x)), u1 = du(x), u2 = constant<T>(6) * k() * c() * x;
    const Vec<T> bend = u2 - constant<T>(2) * t * u1 * u1;
    return vector_tanh_slope<T>(u(x)) * fma(constant<T>(0.5) * x, bend, u1);
  }
};

template <typename T>
struct Silu {
  Vec<T> value(Vec<T> x) const { return x * vector_sigmoid<T>(x); }
  Vec<T> slope(Vec<T> x) const {
    const Vec<T> s = vector_sigmoid<T>(x), one = constant<T>(1);
    return s * fma(x, one - s, one);
  }
  Vec<T> curvature(Vec<T> x) const {
    const Vec<T> s = vector_sigmoid<T>(x), one = constant<T>(1), two = constant<T>(2);
    return s * (one - s) * fma(x, one - two * s, two);
  }
};

template <typename T>
struct Sigmoid {
  Vec<T> value(Vec<T> x) const { return vector_sigmoid<T>(x); }
  Vec<T> slope(Vec<T> x) const {
    const Vec<T> s = vector_sigmoid<T>(x);
    return s * (constant<T>(1) - s);
  }
  Vec<T> curvature(Vec<T> x) const {
    const Vec<T> s = vector_sigmoid<T>(x), one = constant<T>(1);
    return s * (one - s) * (one - constant<T>(2) * s);
  }
};

template <typename T>
struct Tanh {
  Vec<T> value(Vec<T> x) const { return vector_tanh<T>(x); }
  Vec<T> slope(Vec<T> x) const { return vector_tanh_slope<T>(x); }
  Vec<T> curvature(Vec<T> x) const {
    return constant<T>(-2) * vector_tanh<T>(x) * vector_tanh_slope<T>(x);
  }
};

template <typename T>
struct Softplus {  // log(1 + exp(rate x)) / rate, and x itself above the threshold
  Vec<T> rate, threshold;
  MaskVec<T> linear(Vec<T> x) const { return x * rate > threshold; }
  Vec<T> value(Vec<T> x) const {
    return select<T>(linear(x), x, vector_log1p<T>(vector_exp<T>(x * rate)) / rate);
  }
  Vec<T> slope(Vec<T> x) const {
    return select<T>(linear(x), constant<T>(1), vector_sigmoid<T>(x * rate));
  }
  Vec<T> curvature(Vec<T> x) const {
    const Vec<T> s = vector_sigmoid<T>(x * rate);
    return select<T>(linear(x), Vec<T>{}, rate * s * (constant<T>(1) - s));
  }
};

template <typename T>
struct Hardtanh {
  Vec<T> low, high;
  Vec<T> value(Vec<T> x) const { return select<T>(x < low, low, select<T>(x > high, high, x)); }
  Vec<T> slope(Vec<T> x) const {
    return select<T>((x > low) & (x < high), constant<T>(1), Vec<T>{});
  }
  Vec<T> curvature(Vec<T>) const { return Vec<T>{}; }
};

template <typename T>
struct Hardsigmoid {
  static Vec<T> line(Vec<T> x) { return fma(constant<T>(1.0 / 6), x, constant<T>(0.5)); }
  static MaskVec<T> inside(Vec<T> x) { return (x > constant<T>(-3)) & (x < constant<T>(3)); }
  Vec<T> value(Vec<T> x) const {
    return select<T>(x <= constant<T>(-3), Vec<T>{},
                     select<T>(x >= constant<T>(3), constant<T>(1), line(x)));
  }
  Vec<T> slope(Vec<T> x) const { return select<T>(inside(x), constant<T>(1.0 / 6), Vec<T>{}); }
  Vec<T> curvature(Vec<T>) const { return Vec<T>{}; }
};

template <typename T>
struct Hardswish {  // x * hardsigmoid(x)
  using Gate = Hardsigmoid<T>;
  Vec<T> value(Vec<T> x) const { return x * Gate().value(x); }
  Vec<T> slope(Vec<T> x) const {
    const Vec<T> line = fma(constant<T>(1.0 / 3), x, constant<T>(0.5));
    return select<T>(Gate::inside(x), line, Gate().value(x));
  }
  Vec<T> curvature(Vec<T> x) const {
    return select<T>(Gate::inside(x), constant<T>(1.0 / 3), Vec<T>{});
  }
};

template <typename T>
struct Mish {  // x t, t = tanh(log(1 + e)), e = exp(x): 1 - t = 2 / ((e + 1)^2 + 1)
  struct Gate {
    Vec<T> t, bend, s;  // bend = (1 - t^2) s, s = sigmoid(x)
  };
  static Gate gate(Vec<T> x) {
    const Vec<T> one = constant<T>(1), limit = constant<T>(40);  // there t is 1
    const Vec<T> e = vector_exp<T>(select<T>(x > limit, limit, x));
    const Vec<T> numerator = e * (e + constant<T>(2)), part = one / (numerator + constant<T>(2));
    const Vec<T> t = numerator * part, s = e / (one + e);
    return {t, constant<T>(2) * part * (one + t) * s, s};
  }
  Vec<T> value(Vec<T> x) const { return x * gate(x).t; }
  Vec<T> slope(Vec<T> x) const {
    const Gate g = gate(x);
    return fma(x, g.bend, g.t);
  }
  Vec<T> curvature(Vec<T> x) const {
    const Gate g = gate(x);
    const Vec<T> one = constant<T>(1), two = constant<T>(2);
    return g.bend * fma(x, one - g.s - two * g.t * g.s, two);
  }
};

template <typename T>
struct LogSigmoid {
  Vec<T> value(Vec<T> x) const {
    const Vec<T> low = select<T>(x > Vec<T>{}, Vec<T>{}, x);
    return low - vector_log1p<T>(vector_exp<T>(-absolute<T>(x)));
  }
  Vec<T> slope(Vec<T> x) const { return vector_sigmoid<T>(-x); }
  Vec<T> curvature(Vec<T> x) const {
    const Vec<T> s = vector_sigmoid<T>(x);
    return -s * (constant<T>(1) - s);
  }
};

template <typename T>
struct Abs {
  Vec<T> value(Vec<T> x) const { return absolute<T>(x); }
  Vec<T> slope(Vec<T> x) const {
    const Vec<T> one = constant<T>(1);
    return select<T>(x > Vec<T>{}, one, select<T>(x < Vec<T>{}, -one, Vec<T>{}));
  }
  Vec<T> curvature(Vec<T>) const { return Vec<T>{}; }
};

template <typename T>
struct Square {
  Vec<T> value(Vec<T> x) const { return x * x; }
  Vec<T> slope(Vec<T> x) const { return x + x; }
  Vec<T> curvature(Vec<T>) const { return constant<T>(2); }
};

template <typename T>
struct Cube {
  Vec<T> value(Vec<T> x) const { return x * x * x; }
  Vec<T> slope(Vec<T> x) const { return constant<T>(3) * x * x; }
  Vec<T> curvature(Vec<T> x) const { return constant<T>(6) * x; }
};

template <typename T>
struct Reciprocal {
  Vec<T> value(Vec<T> x) const { return constant<T>(1) / x; }
  Vec<T> slope(Vec<T> x) const { return constant<T>(-1) / (x * x); }
  Vec<T> curvature(Vec<T> x) const { return constant<T>(2) / (x * x * x); }
};

template <typename T>
struct Sqrt {
  Vec<T> value(Vec<T> x) const { return square_root<T>(x); }
  Vec<T> slope(Vec<T> x) const { return constant<T>(0.5) / square_root<T>(x); }
  Vec<T> curvature(Vec<T> x) const { return constant<T>(-0.25) / (x * square_root<T>(x)); }
};

template <typename T>
struct Rsqrt {
  Vec<T> value(Vec<T> x) const { return constant<T>(1) / square_root<T>(x); }
  Vec<T> slope(Vec<T> x) const { return constant<T>(-0.5) / (x * square_root<T>(x)); }
  Vec<T> curvature(Vec<T> x) const { return constant<T>(0.75) / (x * x * square_root<T>(x)); }
};

template <typename T>
struct Length {
  static Vec<T> where_positive(Vec<T> x, Vec<T> y) { return select<T>(x > Vec<T>{}, y, Vec<T>{}); }
  Vec<T> value(Vec<T> x) const { return square_root<T>(x); }
  Vec<T> slope(Vec<T> x) const { return where_positive(x, Sqrt<T>().slope(x)); }
  Vec<T> curvature(Vec<T> x) const { return where_positive(x, Sqrt<T>().curvature(x)); }
};

template <typename T>
struct Log {
  Vec<T> value(Vec<T> x) const { return vector_log<T>(x); }
  Vec<T> slope(Vec<T> x) const { return constant<T>(1) / x; }
  Vec<T> curvature(Vec<T> x) const { return constant<T>(-1) / (x * x); }
};

template <typename T>
struct Clamp {
  Vec<T> low, high;
  Vec<T> value(Vec<T> x) const { return select<T>(x < low, low, select<T>(x > high, high, x)); }
  Vec<T> slope(Vec<T> x) const {
    return select<T>((x >= low) & (x <= high), constant<T>(1), Vec<T>{});
  }
  Vec<T> curvature(Vec<T>) const { return Vec<T>{}; }
};

template <typename T>
struct Sin {
  Vec<T> value(Vec<T> x) const { return vector_sin<T>(x); }
  Vec<T> slope(Vec<T> x) const { return vector_cos<T>(x); }
  Vec<T> curvature(Vec<T> x) const { return -vector_sin<T>(x); }
};

template <typename T>
struct Cos {
  Vec<T> value(Vec<T> x) const { return vector_cos<T>(x); }
  Vec<T> slope(Vec<T> x) const { return -vector_sin<T>(x); }
  Vec<T> curvature(Vec<T> x) const { return -vector_cos<T>(x); }
};

template <typename T>
struct Exp {
  Vec<T> value(Vec<T> x) const { return vector_exp<T>(x); }
  Vec<T> slope(Vec<T> x) const { return vector_exp<T>(x); }
  Vec<T> curvature(Vec<T> x) const { return vector_exp<T>(x); }
};

template <typename T>
struct IsPositive {
  Vec<T> value(Vec<T> x) const { return select<T>(x > Vec<T>{}, constant<T>(1), Vec<T>{}); }
  Vec<T> slope(Vec<T>) const { return Vec<T>{}; }
  Vec<T> curvature(Vec<T>) const { return Vec<T>{}; }
};

template <typename T>
struct IsZero {
  Vec<T> value(Vec<T> x) const { return select<T>(x == Vec<T>{}, constant<T>(1), Vec<T>{}); }
  Vec<T> slope(Vec<T>) const { return Vec<T>{}; }
  Vec<T> curvature(Vec<T>) const { return Vec<T>{}; }
};

// Calls body with the function object of a kind.
template <typename T, typename Body>
FASTMAML_INLINE void with_function(Activation kind, T alpha, T beta, Body body) {
  const Vec<T> a = broadcast(alpha), b = broadcast(beta);
  constexpr double kSeluScale = 1.0507009873554804934193349852946;
  constexpr double kSeluAlpha = 1.6732632423543772848170429916717;
  switch (kind) {
    case Activation::kRelu:
      return body(LeakyRelu<T>{Vec<T>{}});
    case Activation::kLeakyRelu:
      return body(LeakyRelu<T>{a});
    case Activation::kElu:
      return body(Elu<T>{a, b, constant<T>(1)});
    case Activation::kSelu:
      return body(
          Elu<T>{constant<T>(kSeluScale * kSeluAlpha), constant<T>(1), constant<T>(kSeluScale)});
    case Activation::kGelu:
      return body(Gelu<T>{});
    case Activation::kGeluTanh:
      return body(GeluTanh<T>{});
    case Activation::kSilu:
      return body(Silu<T>{});
    case Activation::kSigmoid:
      return body(Sigmoid<T>{});
    case Activation::kTanh:
      return body(Tanh<T>{});
    case Activation::kSoftplus:
      return body(Softplus<T>{a, b});
    case Activation::kHardtanh:
      return body(Hardtanh<T>{a, b});
    case Activation::kHardsigmoid:
      return body(Hardsigmoid<T>{});
    case Activation::kHardswish:
      return body(Hardswish<T>{});
    case Activation::kMish:
      return body(Mish<T>{});
    case Activation::kLogSigmoid:
      return body(LogSigmoid<T>{});
    case Activation::kAbs:
      return body(Abs<T>{});
    case Activation::kSquare:
      return body(Square<T>{});
    case Activation::kCube:
      return body(Cube<T>{});
    case Activation::kReciprocal:
      return body(Reciprocal<T>{});
    case Activation::kSqrt:
      return body(Sqrt<T>{});
    case Activation::kRsqrt:
      return body(Rsqrt<T>{});
    case Activation::kLength:
      return body(Length<T>{});
    case Activation::kLog:
      return body(Log<T>{});
    case Activation::kClamp:
      return body(Clamp<T>{a, b});
    case Activation::kSin:
      return body(Sin<T>{});
    case Activation::kCos:
      return body(Cos<T>{});
    case Activation::kExp:
      return body(Exp<T>{});
    case Activation::kIsPositive:
      return body(IsPositive<T>{});
    case Activation::kIsZero:
      return body(IsZero<T>{});
  }
}

// out[i] = (accumulate ? out[i] : 0) + f(i, elements left from i).
template <typename T, typename F>
FASTMAML_INLINE void fill(Index count, T* out, bool accumulate, Share share, F f) {
  const Range mine = split_elements<T>(count, share);
  for (Index i = mine.begin; i < mine.end; i += kLanes<T>) {
    const Index left = mine.end - i;
    Vec<T> value = f(i, left);
    if (accumulate) value += load_up_to(out + i, left);
    store_up_to(out + i, value, left);
  }
}

}  // namespace

template <typename T>
void act_forward(Activation kind, T alpha, T beta, Index count, const T* x, T* y, Share share) {
  with_function(kind, alpha, beta, [&](auto f) {
    fill(count, y, false, share, [&](Index i, Index left) __attribute__((always_inline)) {
      return f.value(load_up_to(x + i, left));
    });
  });
}

template <typename T>
void act_backward(Activation kind, T alpha, T beta, Index count, const T* x, const T* gy, T* gx,
                  bool accumulate, Share share) {
  with_function(kind, alpha, beta, [&](auto f) {
    fill(count, gx, accumulate, share, [&](Index i, Index left) __attribute__((always_inline)) {
      return f.slope(load_up_to(x + i, left)) * load_up_to(gy + i, left);
    });
  });
}

template <typename T>
void act_tangent(Activation kind, T alpha, T beta, Index count, const T* x, const T* dx, T* dy,
                 Share share) {
  act_backward(kind, alpha, beta, count, x, dx, dy, false, share);
}

template <typename T>
void act_backward_tangent(Activation kind, T alpha, T beta, Index count, const T* x, const T* dx,
                          const T* gy, const T* dgy, T* dgx, bool accumulate, Share share) {
  with_function(kind, alpha, beta, [&](auto f) {
    fill(count, dgx, accumulate, share, [&](Index i, Index left) __attribute__((always_inline)) {
      const Vec<T> at = load_up_to(x + i, left);
      Vec<T> value = {};
      if (dgy) value = f.slope(at) * load_up_to(dgy + i, left);
      if (dx) value += f.curvature(at) * load_up_to(dx + i, left) * load_up_to(gy + i, left);
      return value;
    });
  });
}

#define FASTMAML_INSTANTIATE(T)                                                                \
  template void act_forward<T>(Activation, T, T, Index, const T*, T*, Share);                  \
  template void act_backward<T>(Activation, T, T, Index, const T*, const T*, T*, bool, Share); \
  template void act_tangent<T>(Activation, T, T, Index, const T*, const T*, T*, Share);        \
  template void act_backward_tangent<T>(Activation, T, T, Index, const T*, const T*, const T*, \
                                        const T*, T*, bool, Share);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
