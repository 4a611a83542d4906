// A small multi-layer perceptron of one task, in the shared memory of one team: forward, loss and
// backward, each alone or together with its tangent along a direction in theta.
//
// Parameters are kept with rows of an odd length, so that threads that read a column of a weight
// matrix find it in different banks: parameter `index` of theta lies in some `place`.
#pragma once

#include "cuda/activation.h"
#include "cuda/team.h"

namespace fastmaml {
namespace FASTMAML_TEAM_NAMESPACE {

struct Layer {
  int in, out, row;              // row: elements from one output's weights to the next's
  int weight, bias;              // places; no bias: -1
  int weight_index, bias_index;  // in theta
  int values;                    // elements of all layers before, per example
  int activation;                // -1: none
  double alpha, beta;
};

// What the passes keep of every layer's outputs, layer after layer, [examples][out] each.
template <typename T>
struct Values {
  T* post;    // after the activation
  T* slope;   // its derivative
  T* delta;   // the loss's gradient before the activation
  T* dpost;   // tangents of post
  T* bend;    // ... of slope
  T* ddelta;  // ... of delta
};

template <typename T>
struct Examples {
  const T* x;           // [count][in], in shared memory
  const void* targets;  // [count] labels, or [count][out]
  int count;
};

struct Network {
  static constexpr int kMostLayers = 12;

  Layer layers[kMostLayers];
  int depth, places, widths;  // widths: of all layers together
  TaskLoss loss;

  FASTMAML_TEAM const Layer& last() const { return layers[depth - 1]; }

  // each(place, index) for all parameters, shared out over the team.
  template <typename Each>
  FASTMAML_TEAM void for_each_parameter(const Team& team, Each each) const {
    for (int l = 0; l < depth; ++l) {
      const Layer& layer = layers[l];
      for (int i = team.rank(); i < layer.in * layer.out; i += team.size()) {
        each(layer.weight + i / layer.in * layer.row + i % layer.in, layer.weight_index + i);
      }
      if (layer.bias < 0) continue;
      for (int i = team.rank(); i < layer.out; i += team.size()) {
        each(layer.bias + i, layer.bias_index + i);
      }
    }
  }

  // Fills post and slope, with kTangent also dpost and bend along `direction`. Ends with a sync.
  template <bool kTangent, typename T>
  FASTMAML_TEAM void forward(const Team& team, const T* theta, const T* direction,
                             const Examples<T>& examples, const Values<T>& v) const {
    for (int l = 0; l < depth; ++l) {
      const Layer& layer = layers[l];
      const int at = layer.values * examples.count;
      const T* x = input(l, examples, v.post);
      const T* dx = l == 0 ? nullptr : input(l, examples, v.dpost);
      for (int i = team.rank(); i < examples.count * layer.out; i += team.size()) {
        const int n = i / layer.out, o = i % layer.out;
        const T* w = theta + layer.weight + o * layer.row;
        T y = layer.bias < 0 ? T(0) : theta[layer.bias + o];
        T dy = !kTangent || layer.bias < 0 ? T(0) : direction[layer.bias + o];
        for (int c = 0; c < layer.in; ++c) {
          y += w[c] * x[n * layer.in + c];
          if constexpr (kTangent) {
            dy += direction[layer.weight + o * layer.row + c] * x[n * layer.in + c];
            if (dx != nullptr) dy += w[c] * dx[n * layer.in + c];
          }
        }
        const Jet<T> f = layer.activation < 0
                             ? Jet<T>{y, 1, 0}
                             : activation(static_cast<Activation>(layer.activation), y,
                                          T(layer.alpha), T(layer.beta));
        v.post[at + i] = f.value;
        v.slope[at + i] = f.first;
        if constexpr (kTangent) {
          v.dpost[at + i] = f.first * dy;
          v.bend[at + i] = f.second * dy;
        }
      }
      team.sync();
    }
  }

  // Fills the last layer's delta, with kTangent also ddelta; with `losses` [count] each example's
  // share of the loss. Ends with a sync.
  template <bool kTangent, typename T>
  FASTMAML_TEAM void loss_gradient(const Team& team, const Examples<T>& examples,
                                   const Values<T>& v, T* losses) const {
    const int width = last().out;
    for (int n = team.rank(); n < examples.count; n += team.size()) {
      const int at = last().values * examples.count + n * width;
      const T value = loss == TaskLoss::kCrossEntropy
                          ? cross_entropy<kTangent>(examples, v, n, at, width)
                          : squared_error<kTangent>(examples, v, n, at, width);
      if (losses != nullptr) losses[n] = value;
    }
    team.sync();
  }

  // From the last layer's delta to the gradients: sink(place, index, gradient, its tangent) for
  // every parameter, after `theta` and `direction` have been read there for the last time. Does not
  // end with a sync.
  template <bool kTangent, typename T, typename Sink>
  FASTMAML_TEAM void backward(const Team& team, const T* theta, const T* direction,
                              const Examples<T>& examples, const Values<T>& v, Sink sink) const {
    for (int l = depth - 1; l >= 0; --l) {
      if (l > 0) {
        to_layer_before<kTangent>(team, l, theta, direction, examples.count, v);
        team.sync();
      }
      parameters<kTangent>(team, l, examples, v, sink);
    }
  }

 private:
  template <typename T>
  FASTMAML_TEAM const T* input(int l, const Examples<T>& examples, const T* values) const {
    return l == 0 ? examples.x : values + layers[l - 1].values * examples.count;
  }

  template <bool kTangent, typename T>
  FASTMAML_TEAM void to_layer_before(const Team& team, int l, const T* theta, const T* direction,
                                     int count, const Values<T>& v) const {
    const Layer& layer = layers[l];
    const int at = layer.values * count, before = layers[l - 1].values * count;
    for (int i = team.rank(); i < count * layer.in; i += team.size()) {
      const int n = i / layer.in, c = i % layer.in;
      const T* w = theta + layer.weight + c;
      const T* delta = v.delta + at + n * layer.out;
      T g = 0, dg = 0;
      for (int o = 0; o < layer.out; ++o) {
        g += w[o * layer.row] * delta[o];
        if constexpr (kTangent) {
          dg += direction[layer.weight + c + o * layer.row] * delta[o];
          dg += w[o * layer.row] * v.ddelta[at + n * layer.out + o];
        }
      }
      v.delta[before + i] = v.slope[before + i] * g;
      if constexpr (kTangent) {
        v.ddelta[before + i] = v.bend[before + i] * g + v.slope[before + i] * dg;
      }
    }
  }

  template <bool kTangent, typename T, typename Sink>
  FASTMAML_TEAM void parameters(const Team& team, int l, const Examples<T>& examples,
                                const Values<T>& v, Sink& sink) const {
    const Layer& layer = layers[l];
    const int at = layer.values * examples.count;
    const T* x = input(l, examples, v.post);
    const T* dx = l == 0 ? nullptr : input(l, examples, v.dpost);
    const int columns = layer.in + (layer.bias < 0 ? 0 : 1);
    for (int i = team.rank(); i < layer.out * columns; i += team.size()) {
      const int o = i / columns, c = i % columns;
      const bool bias = c == layer.in;
      T g = 0, dg = 0;
      for (int n = 0; n < examples.count; ++n) {
        const T delta = v.delta[at + n * layer.out + o];
        const T factor = bias ? T(1) : x[n * layer.in + c];
        g += delta * factor;
        if constexpr (kTangent) {
          dg += v.ddelta[at + n * layer.out + o] * factor;
          if (dx != nullptr && !bias) dg += delta * dx[n * layer.in + c];
        }
      }
      sink(bias ? layer.bias + o : layer.weight + o * layer.row + c,
           bias ? layer.bias_index + o : layer.weight_index + o * layer.in + c, g, dg);
    }
  }

  template <bool kTangent, typename T>
  FASTMAML_TEAM static void set_delta(const Values<T>& v, int at, T gradient, T tangent) {
    v.delta[at] = v.slope[at] * gradient;
    if constexpr (kTangent) v.ddelta[at] = v.bend[at] * gradient + v.slope[at] * tangent;
  }

  // A label out of range makes the loss NaN, and its gradient.
  template <bool kTangent, typename T>
  FASTMAML_TEAM T cross_entropy(const Examples<T>& examples, const Values<T>& v, int n, int at,
                                int width) const {
    const Index label = static_cast<const Index*>(examples.targets)[n];
    const bool known = label >= 0 && label < width;
    const T* y = v.post + at;
    T most = y[0], sum = 0, along = 0;
    for (int c = 1; c < width; ++c) most = y[c] > most ? y[c] : most;
    for (int c = 0; c < width; ++c) sum += exp(y[c] - most);
    if constexpr (kTangent) {
      for (int c = 0; c < width; ++c) along += exp(y[c] - most) / sum * v.dpost[at + c];
    }
    for (int c = 0; c < width; ++c) {
      const T p = exp(y[c] - most) / sum;
      const T bent = kTangent ? p * (v.dpost[at + c] - along) : T(0);
      const T own = known ? T(c == label) : T(NAN);
      set_delta<kTangent>(v, at + c, (p - own) / T(examples.count), bent / T(examples.count));
    }
    return known ? (log(sum) + most - y[label]) / T(examples.count) : T(NAN);
  }

  template <bool kTangent, typename T>
  FASTMAML_TEAM T squared_error(const Examples<T>& examples, const Values<T>& v, int n, int at,
                                int width) const {
    const T* target = static_cast<const T*>(examples.targets) + n * width;
    const T scale = T(1) / T(examples.count * width);
    T sum = 0;
    for (int c = 0; c < width; ++c) {
      const T error = v.post[at + c] - target[c];
      sum += error * error;
      set_delta<kTangent>(v, at + c, 2 * scale * error,
                          kTangent ? 2 * scale * v.dpost[at + c] : T(0));
    }
    return sum * scale;
  }
};

}  // namespace FASTMAML_TEAM_NAMESPACE
}  // namespace fastmaml
