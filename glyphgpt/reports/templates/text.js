// A text and its tokens, and what the network predicted for each of them.
//
// A piece is what the page shows and colors as one: the smallest number of tokens that are whole characters. A piece
// without tokens is a character that the model does not know.

"use strict";

class CharTokenizer {
  unit = "character";

  constructor({ characters }) {
    this.characters = Array.from(characters);
    this.ids = new Map(this.characters.map((character, id) => [character, id]));
  }

  pieces(text) {
    return Array.from(text, (character) => {
      const id = this.ids.get(character);
      return { text: character, tokens: id === undefined ? [] : [id] };
    });
  }

  tokenBytes(token) {
    return new TextEncoder().encode(this.characters[token]);
  }
}

class ByteTokenizer {
  unit = "byte";

  pieces(text) {
    const encoder = new TextEncoder();
    return Array.from(text, (character) => ({ text: character, tokens: Array.from(encoder.encode(character)) }));
  }

  tokenBytes(token) {
    return Uint8Array.of(token);
  }
}

// Byte-pair encoding within GPT-2's words. Strings stand for bytes here: each character is a byte.
class BPETokenizer {
  static WORDS = new RegExp([
    "'(?:[sdmt]|ll|ve|re)", " ?\\p{L}+", " ?\\p{N}+", " ?[^\\p{White_Space}\\p{L}\\p{N}]+",
    "\\p{White_Space}+(?!\\P{White_Space})", "\\p{White_Space}+",
  ].join("|"), "gu");

  unit = "token";

  // `vocabulary` has the bytes of every token, by its id; of two tokens that can be merged, the lower id comes first.
  constructor({ vocabulary }) {
    this.vocabulary = vocabulary;
    this.ids = new Map(vocabulary.map((bytes, id) => [bytes, id]));
  }

  pieces(text) {
    const encoder = new TextEncoder();
    const words = (text.match(BPETokenizer.WORDS) ?? []).map(
      (word) => Array.from(encoder.encode(word), (byte) => String.fromCharCode(byte)));
    return joinPieces(words.flatMap((word) => this.encodeWord(word)), this);
  }

  // Returns the tokens of a word, a list of bytes: merges the neighbors with the lowest id, until there are none.
  encodeWord(parts) {
    for (;;) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const id = this.ids.get(parts[i] + parts[i + 1]);
        if (id < best) [best, at] = [id, i];
      }
      if (at < 0) return parts.map((part) => this.ids.get(part));
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }

  tokenBytes(token) {
    return Uint8Array.from(this.vocabulary[token], (byte) => byte.charCodeAt(0));
  }
}

// Records, with a token before and after each. The text that separates them is shown in its place.
class RecordTokenizer {
  constructor({ base, separator, end }) {
    this.base = new TOKENIZERS[base.kind](base);
    Object.assign(this, { separator, end, unit: this.base.unit });
  }

  // A text begins with a record, whether or not it begins with a separator.
  pieces(text) {
    const records = text.split(this.separator);
    if (!records[0]) records.shift();
    return records.flatMap((record) => [{ text: this.separator, tokens: [this.end] }, ...this.base.pieces(record)]);
  }

  tokenBytes(token) {
    return token === this.end ? new TextEncoder().encode(this.separator) : this.base.tokenBytes(token);
  }
}

const TOKENIZERS = { char: CharTokenizer, byte: ByteTokenizer, bpe: BPETokenizer, records: RecordTokenizer };

// Joins tokens to pieces. The last piece may be unfinished: its text is then empty.
function joinPieces(tokens, tokenizer) {
  const pieces = [];
  for (const token of tokens) appendToken(pieces, token, tokenizer);
  return pieces;
}

// Adds a token to the last piece if that is unfinished, otherwise as a piece of its own.
function appendToken(pieces, token, tokenizer) {
  let piece = pieces.at(-1);
  if (!piece || piece.text || !piece.tokens.length) pieces.push((piece = { text: "", tokens: [] }));
  piece.tokens.push(token);
  const bytes = piece.tokens.flatMap((token) => Array.from(tokenizer.tokenBytes(token)));
  if (!isUnfinished(bytes)) piece.text = new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(bytes));
}

// Returns whether the last character of UTF-8 text lacks some of its bytes.
function isUnfinished(bytes) {
  for (let back = 1; back <= Math.min(3, bytes.length); back++) {
    const byte = bytes.at(-back);
    if (byte >= 0xc0) return byte < 0xf5 && back < (byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2);
    if (byte < 0x80) return false;
  }
  return false;
}

// A text under a network. It is read token by token, so that a page can show it meanwhile.
class ModelText {
  constructor(gpt, tokenizer) {
    Object.assign(this, { gpt, tokenizer, pieces: [], tokens: [] });
    this.bits = []; // of each token that was predicted: -log2 of its probability
    this.contexts = new Map(); // by the index of their first token
    this.predicted = 0; // the tokens up to this one, or the next one after the text, are predicted
  }

  get text() {
    return this.pieces.map((piece) => piece.text).join("");
  }

  // Replaces the text; what it has in common with the previous one is not read again.
  set text(text) {
    const pieces = this.tokenizer.pieces(text), tokens = pieces.flatMap((piece) => piece.tokens);
    let same = 0;
    while (same < tokens.length && tokens[same] === this.tokens[same]) same++;
    this.forget(same);
    Object.assign(this, { pieces, tokens });
    this.measure();
  }

  // Appends a token that the model has chosen.
  append(token) {
    this.tokens.push(token);
    appendToken(this.pieces, token, this.tokenizer);
    this.measure();
  }

  // Removes a piece and everything after it.
  cut(piece) {
    this.pieces.length = piece;
    this.tokens.length = this.tokenIndex(piece);
    this.forget(this.tokens.length);
  }

  // Returns the index of the first token of a piece.
  tokenIndex(piece) {
    let index = 0;
    for (let i = 0; i < piece; i++) index += this.pieces[i].tokens.length;
    return index;
  }

  // Forgets what depends on the tokens from this index on.
  forget(length) {
    const start = contextStart(length, this.gpt.config.block_size);
    for (const [first, context] of this.contexts) {
      if (first > start || first >= length) this.contexts.delete(first);
      else context.tokens.length = Math.min(context.tokens.length, length - first);
    }
    this.predicted = Math.min(this.predicted, length);
    this.bits.length = Math.min(this.bits.length, length);
  }

  // Returns the context in which a token was or will be predicted. It ends before the token.
  context(index) {
    const start = contextStart(index, this.gpt.config.block_size);
    if (!this.contexts.has(start)) this.contexts.set(start, new Context(this.gpt.config));
    return { start, context: this.contexts.get(start) };
  }

  // Whether the text is read: the token after it is predicted.
  get isRead() {
    return this.predicted === this.tokens.length;
  }

  // Lets the network read one more token.
  read() {
    const next = this.predicted + 1, { start, context } = this.context(next);
    this.gpt.read(context, this.tokens[start + context.tokens.length]);
    if (start + context.tokens.length < next) return; // a new context begins with tokens that were read before
    this.predicted = next;
    this.measure();
  }

  // Computes the bits of the token that was predicted last, if the text has it already.
  measure() {
    if (this.predicted && this.predicted < this.tokens.length) {
      const probs = softmax(this.logits(this.predicted));
      this.bits[this.predicted] = -Math.log2(probs[this.tokens[this.predicted]]);
    }
  }

  // Returns the logits (V) of a token that is predicted, from the tokens before it. The first token has none.
  logits(index) {
    const { start, context } = this.context(index);
    return this.gpt.logits(context, index - start - 1).slice();
  }

  // Returns the attention weights of a head when it predicted a token, and the index of the first token they are for.
  attention(index, layer, head) {
    const { start, context } = this.context(index);
    return { start, weights: this.gpt.attentionWeights(context.layers[layer], head, index - start - 1) };
  }
}

// Returns the probabilities (V) from which a token is drawn, for the parameters of sample.py.
function samplingProbs(logits, { temperature, topK, topP, minP }) {
  const probs = new Float64Array(logits);
  if (temperature < 1e-6) {
    const best = probs.indexOf(probs.reduce((a, b) => Math.max(a, b)));
    return probs.map((_, token) => (token === best ? 1 : 0));
  }
  softmax(probs, temperature);
  const sorted = probs.slice().sort().reverse();
  let least = topK > 0 && topK < sorted.length ? sorted[topK - 1] : 0;
  if (topP < 1) {
    const kept = sorted.filter((prob) => prob >= least), total = kept.reduce((sum, prob) => sum + prob, 0);
    let sum = 0, last = 0;
    while (last < kept.length && sum < topP * total) sum += kept[last++];
    least = Math.max(least, kept[last - 1]);
  }
  least = Math.max(least, minP * sorted[0]);
  let total = 0;
  for (let i = 0; i < probs.length; i++) total += probs[i] = probs[i] < least ? 0 : probs[i];
  return probs.map((prob) => prob / total);
}

// Returns a number in [0, 1) that depends on a seed and a position, so that a text can be continued at any place.
function uniform(seed, position) {
  let hash = Math.imul(seed, 0x9e3779b1) ^ Math.imul(position + 1, 0x85ebca77);
  for (const factor of [0x7feb352d, 0x846ca68b]) hash = Math.imul(hash ^ (hash >>> 16), factor); // a mixer of 32 bits
  return ((hash ^ (hash >>> 16)) >>> 0) / 2 ** 32;
}

// Draws an index with these probabilities; `random` is a number in [0, 1).
function draw(probs, random) {
  let sum = 0;
  for (let i = 0; i < probs.length; i++) if ((sum += probs[i]) > random) return i;
  return Math.max(0, probs.findLastIndex((prob) => prob > 0)); // the sum may be rounded to less than 1
}
