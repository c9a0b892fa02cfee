// The network of model.py in plain JavaScript. It reads one token at a time, as a text does when it is written.
//
// Shape letters as in model.py: C channels, H heads, D head size, V vocabulary. Vectors are Float32Arrays; sums are
// computed in double precision. tests/reports/test_gpt_js.py compares the logits with those of the NumPy network.

"use strict";

const EPSILON = { layernorm: 1e-5, rmsnorm: 1e-6 };
const HASH_FACTOR = 1_000_003n;

// Returns the values of all 65,536 numbers in float16, by their bits.
function float16Values() {
  return Float32Array.from({ length: 65536 }, (_, bits) => {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : sign * 2 ** -14 * (fraction / 1024);
  });
}

// A weight as the page stores it: float32, float16, or int8 with a factor for each row.
class Weight {
  static float16 = float16Values();

  // `values` is a Float32Array; a Uint16Array with the bits of float16; or an Int8Array, which needs `factors`.
  constructor(shape, values, factors = null) {
    [this.rows, this.columns] = shape.length === 2 ? shape : [1, shape[0]];
    Object.assign(this, { values, factors });
  }

  // Adds a row to `out`. Tables stay small in memory, because only the rows that a text needs are converted.
  addRow(row, out) {
    const { columns, values, factors } = this, start = row * columns;
    if (factors) {
      for (let i = 0; i < columns; i++) out[i] += factors[row] * values[start + i];
    } else if (values instanceof Uint16Array) {
      for (let i = 0; i < columns; i++) out[i] += Weight.float16[values[start + i]];
    } else {
      for (let i = 0; i < columns; i++) out[i] += values[start + i];
    }
  }

  // Returns all rows in float32.
  toFloat32() {
    if (this.values instanceof Float32Array) return this.values;
    const { rows, columns } = this, all = new Float32Array(rows * columns);
    for (let row = 0; row < rows; row++) this.addRow(row, all.subarray(row * columns, (row + 1) * columns));
    return all;
  }
}

// Returns Weights by their names, from their index and their bytes in base64 (glyphgpt/reports/model_page.py).
function readWeights(index, base64) {
  const binary = atob(base64), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  const types = { float32: Float32Array, float16: Uint16Array, int8: Int8Array };
  const read = ({ type, offset, size }) => new types[type](bytes.buffer, offset, size);
  return Object.fromEntries(index.map(({ name, shape, values, factors }) =>
    [name, new Weight(shape, read(values), factors && read(factors))]));
}

// y = W x + b, where W is (outputs, inputs).
class Linear {
  constructor(weight, bias) {
    this.inputs = weight.columns;
    this.weight = weight.toFloat32();
    this.bias = bias ? bias.toFloat32() : null;
    this.y = new Float32Array(weight.rows);
  }

  // Returns y, which the next call overwrites.
  apply(x) {
    const { inputs, weight, bias, y } = this, even = inputs - (inputs % 4);
    for (let row = 0, start = 0; row < y.length; row++, start += inputs) {
      let a = bias ? bias[row] : 0, b = 0, c = 0, d = 0; // four sums do not wait for each other
      for (let i = 0; i < even; i += 4) {
        a += weight[start + i] * x[i];
        b += weight[start + i + 1] * x[i + 1];
        c += weight[start + i + 2] * x[i + 2];
        d += weight[start + i + 3] * x[i + 3];
      }
      for (let i = even; i < inputs; i++) a += weight[start + i] * x[i];
      y[row] = a + b + (c + d);
    }
    return y;
  }
}

// The normalization of the config, with gain and bias where it has them.
class Norm {
  constructor(kind, gain, bias) {
    this.centered = kind === "layernorm";
    this.epsilon = EPSILON[kind];
    this.gain = gain ? gain.toFloat32() : null;
    this.bias = bias ? bias.toFloat32() : null;
  }

  apply(x) {
    const y = x.slice();
    if (this.centered) {
      let sum = 0;
      for (let i = 0; i < y.length; i++) sum += y[i];
      for (let i = 0; i < y.length; i++) y[i] -= sum / y.length;
    }
    rmsNorm(y, this.epsilon);
    if (this.gain) for (let i = 0; i < y.length; i++) y[i] = y[i] * this.gain[i] + (this.bias ? this.bias[i] : 0);
    return y;
  }
}

// Divides x by its root mean square, in place.
function rmsNorm(x, epsilon = EPSILON.rmsnorm) {
  let squares = 0;
  for (let i = 0; i < x.length; i++) squares += x[i] * x[i];
  const factor = 1 / Math.sqrt(squares / x.length + epsilon);
  for (let i = 0; i < x.length; i++) x[i] *= factor;
}

// erf by Abramowitz & Stegun 1964, 7.1.26, exact to 1.5e-7.
function erf(x) {
  const z = Math.abs(x), t = 1 / (1 + 0.3275911 * z);
  const sum = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
  return Math.sign(x) * (1 - sum * Math.exp(-z * z));
}

const ACTIVATIONS = {
  relu2: (x) => (x > 0 ? x * x : 0),
  gelu: (x) => (x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x * x * x)))) / 2,
  gelu_erf: (x) => (x * (1 + erf(x / Math.SQRT2))) / 2,
};

// The context of consecutive tokens, with what the network computed for each: its output, and in every layer the
// queries, keys and values.
class Context {
  constructor({ block_size, n_layer, n_embd }) {
    const vectors = () => new Float32Array(block_size * n_embd); // one for each token
    this.tokens = [];
    this.layers = Array.from({ length: n_layer }, () => ({ queries: vectors(), keys: vectors(), values: vectors() }));
    this.outputs = vectors();
  }
}

class GPT {
  // `config` has the fields of GPTConfig and `embedding_scale`; `weights` maps the names in a checkpoint to Weights.
  constructor(config, weights) {
    this.config = config;
    const linear = (name) => new Linear(weights[`${name}.weight`], weights[`${name}.bias`]);
    const norm = (name) => new Norm(config.norm, weights[`${name}.weight`], weights[`${name}.bias`]);
    this.embedding = weights["token_embedding.weight"];
    this.tables = Array.from({ length: config.ngram - 1 }, (_, i) => weights[`ngram_embedding.tables.${i}.weight`]);
    this.mix = config.token_shift ? weights["token_shift.mix"].toFloat32() : null;
    this.positions = weights["position.embedding.weight"];
    this.blocks = Array.from({ length: config.n_layer }, (_, layer) => ({
      attentionNorm: norm(`blocks.${layer}.attention_norm`),
      qkv: linear(`blocks.${layer}.attention.qkv`),
      out: linear(`blocks.${layer}.attention.out`),
      mlpNorm: norm(`blocks.${layer}.mlp_norm`),
      up: linear(`blocks.${layer}.mlp.up`),
      down: linear(`blocks.${layer}.mlp.down`),
    }));
    this.norm = norm("norm");
    this.head = linear(config.tie_embeddings ? "token_embedding" : "head");
    this.activation = ACTIVATIONS[config.activation];
    this.headSize = config.n_embd / config.n_head;
  }

  // Appends a token to a context that has room for it, and computes its vectors.
  read(context, token) {
    const { n_embd: C } = this.config, position = context.tokens.push(token) - 1;
    const x = this.embed(context.tokens, position);
    this.blocks.forEach((block, layer) => {
      add(x, this.attention(block, block.attentionNorm.apply(x), context.layers[layer], position));
      const hidden = block.up.apply(block.mlpNorm.apply(x));
      for (let i = 0; i < hidden.length; i++) hidden[i] = this.activation(hidden[i]);
      add(x, block.down.apply(hidden));
    });
    context.outputs.set(this.norm.apply(x), position * C);
  }

  // Returns the logits (V) of the token after a position of a context. The next call overwrites them.
  logits(context, position) {
    const { n_embd: C } = this.config;
    return this.head.apply(context.outputs.subarray(position * C, (position + 1) * C));
  }

  // Returns the input (C) of the first block at a position.
  embed(tokens, position) {
    const { n_embd: C, position: kind, embedding_scale: scale } = this.config;
    const x = this.tokenVector(tokens, position);
    if (this.mix && position) {
      const previous = this.tokenVector(tokens, position - 1);
      for (let i = 0; i < C; i++) x[i] += this.mix[i] * previous[i];
    }
    if (kind === "learned") this.positions.addRow(position, x);
    if (kind === "sinusoidal") {
      for (let i = 0; i < C; i++) {
        const angle = position * 10000 ** (-(i - (i % 2)) / C);
        x[i] = x[i] * scale + (i % 2 ? Math.cos(angle) : Math.sin(angle));
      }
    }
    return x;
  }

  // Returns the embedding (C) of a token and of the n-grams that end with it.
  tokenVector(tokens, position) {
    const x = new Float32Array(this.config.n_embd);
    this.embedding.addRow(tokens[position], x);
    if (!this.tables.length) return x;
    let key = BigInt(tokens[position] + 1); // 0 is for positions before the context
    const rows = BigInt(this.config.ngram_rows);
    this.tables.forEach((table, i) => {
      const earlier = i < position ? tokens[position - 1 - i] + 1 : 0;
      key = BigInt.asIntN(64, key * HASH_FACTOR + BigInt(earlier)); // wraps around as in PyTorch
      table.addRow(Number(((key % rows) + rows) % rows), x);
    });
    rmsNorm(x);
    return x;
  }

  // Stores a token's query, key and value, computed from x (C), and returns the output (C) of attention.
  attention(block, x, layer, position) {
    const { n_embd: C, n_head: H, qk_norm, position: kind } = this.config, D = this.headSize;
    const qkv = block.qkv.apply(x);
    for (let start = 0; start < 2 * C; start += D) { // the heads' queries, then their keys
      const vector = qkv.subarray(start, start + D);
      if (qk_norm) rmsNorm(vector);
      if (kind === "rotary") rotate(vector, position);
    }
    [layer.queries, layer.keys, layer.values].forEach((vectors, i) => {
      vectors.set(qkv.subarray(i * C, (i + 1) * C), position * C);
    });
    const y = new Float32Array(C);
    for (let head = 0; head < H; head++) {
      const weights = this.attentionWeights(layer, head, position);
      for (let key = 0; key <= position; key++) {
        const weight = weights[key], start = key * C + head * D;
        for (let i = 0; i < D; i++) y[head * D + i] += weight * layer.values[start + i];
      }
    }
    return block.out.apply(y);
  }

  // Returns the weights of a head's attention from a position to itself and every position before it.
  attentionWeights({ queries, keys }, head, position) {
    const { n_embd: C } = this.config, D = this.headSize, query = position * C + head * D;
    const scores = new Float32Array(position + 1);
    for (let key = 0; key <= position; key++) {
      const start = key * C + head * D;
      let sum = 0;
      for (let i = 0; i < D; i++) sum += queries[query + i] * keys[start + i];
      scores[key] = sum / Math.sqrt(D);
    }
    return softmax(scores);
  }
}

// Adds y to x.
function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
}

// Rotates the pairs (i, i + D / 2) of a vector (D) by angles that are proportional to the position.
function rotate(vector, position) {
  const half = vector.length / 2;
  for (let i = 0; i < half; i++) {
    const angle = position * 10000 ** (-i / half), cos = Math.cos(angle), sin = Math.sin(angle);
    const first = vector[i], second = vector[i + half];
    vector[i] = first * cos - second * sin;
    vector[i + half] = first * sin + second * cos;
  }
}

// Replaces scores by exp(score / temperature), normalized to a sum of 1, and returns them.
function softmax(scores, temperature = 1) {
  let highest = -Infinity, sum = 0;
  for (let i = 0; i < scores.length; i++) highest = Math.max(highest, scores[i]);
  for (let i = 0; i < scores.length; i++) sum += scores[i] = Math.exp((scores[i] - highest) / temperature);
  for (let i = 0; i < scores.length; i++) scores[i] /= sum;
  return scores;
}

// Returns where the context of the next token starts in a text of `length` tokens: it grows to blockSize tokens, drops
// its older half, and grows again, as in sample.py.
function contextStart(length, blockSize) {
  if (length <= blockSize) return 0;
  const hop = blockSize - Math.floor(blockSize / 2);
  return Math.ceil((length - blockSize) / hop) * hop;
}
