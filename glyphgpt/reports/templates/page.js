// The page: it shows a text with the model's predictions, and lets the model continue it.

"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const MEAN = -1; // index of the mean of a layer's heads
const TOP = 12; // most probable tokens, and largest attention weights, that are shown
const SLICE = 20; // milliseconds of computation between two updates of the page
const MANY_BITS = 8; // a character of this surprise, or more, has the full color
const SYMBOLS = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍" };
const NAMES = { " ": "space", "\n": "new line", "\t": "tab", "\r": "carriage return" };

const VIEWS = {
  surprise: {
    name: "surprise",
    hint: "The stronger the color of a character, the less the model expected it. Point at a character to see what " +
      "was expected there; click to keep it.",
    scale: [[0, "0 bits"], [0.25, "2"], [0.5, "4"], [0.75, "6"], [1, "8 or more"]],
  },
  attention: {
    name: "attention",
    hint: "The color of a character is the attention that it got when the outlined one was predicted. Point at " +
      "another one; click to keep it.",
    scale: [0.01, 0.1, 0.25, 0.5, 1].map((weight) => [Math.sqrt(weight), `${100 * weight}\u202f%`]),
  },
  plain: {
    name: "none",
    hint: "Point at a character to see what the model expected there; click to keep it.",
    scale: [],
  },
};

const CONTROLS = [
  {
    id: "temperature", name: "Temperature", min: 0, max: 2, step: 0.05, value: 0.8,
    help: "Below 1 the text becomes more conservative, above 1 more random. 0 always takes the most probable token.",
  },
  {
    id: "topK", name: "Top k", min: 0, max: 100, step: 1, value: 0,
    help: "Draws only from the k most probable tokens. 0 allows all.",
  },
  {
    id: "topP", name: "Top p", min: 0.05, max: 1, step: 0.05, value: 1,
    help: "Draws only from the most probable tokens whose probabilities add up to p.",
  },
  {
    id: "minP", name: "Min p", min: 0, max: 0.5, step: 0.01, value: 0,
    help: "Draws only from tokens at least this fraction as probable as the most probable one.",
  },
  {
    id: "length", name: "Length", min: 10, max: 2000, step: 10, value: 300,
    help: "How many tokens the model writes before it stops.",
  },
  {
    id: "seed", name: "Seed", min: 1, max: 1000, step: 1, value: 1,
    help: "The same seed, text and settings give the same continuation.",
  },
];

const $ = (id) => document.getElementById(id);

// ---------------------------------------------------------------- elements; strings become text, never markup

function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

function setHeat(node, strength) {
  if (node.heat === strength) return; // changing the style of every character is slow
  node.heat = strength;
  node.style.setProperty("--heat", strength.toFixed(3));
}

function bar(tag, label, fraction) {
  const filled = element("span", "");
  filled.style.setProperty("--fraction", fraction);
  const number = element("span", "number", percent(fraction));
  return element(tag, "bar", element("bdi", "token", label), element("span", "track", filled), number);
}

function radio(name, checked, onChange) {
  const input = Object.assign(element("input", ""), { type: "radio", name, checked });
  input.addEventListener("change", onChange);
  return input;
}

function sum(numbers) {
  return numbers.reduce((a, b) => a + b, 0);
}

function percent(fraction) {
  return fraction > 0 && fraction < 0.0005 ? "< 0.1\u202f%" : `${(100 * fraction).toFixed(1)}\u202f%`;
}

// Returns text on one line: symbols or code points replace white space and characters without a shape.
function visible(text) {
  return text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Z}]/gu, (c) => SYMBOLS[c] ?? codePoint(c));
}

function codePoint(character) {
  return `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
}

// ---------------------------------------------------------------- the model and its text

const tokenizer = new TOKENIZERS[data.tokenizer.kind](data.tokenizer);
const story = new ModelText(new GPT(data.config, readWeights(data.tensors, data.weights)), tokenizer);
data.weights = ""; // free the memory

const state = {
  view: data.view,
  selected: null, // index of a piece; null is the next one, after the text
  pinned: false, // whether the mouse no longer selects
  layer: data.config.n_layer - 1,
  head: MEAN,
  remaining: 0, // tokens to write
  written: 0, // tokens written since the start
  started: 0, // when it began to write, in milliseconds
  elapsed: 0, // since then
  origin: null, // index of the piece with which the last continuation began
};

// A text area changes carriage returns; a symbol stands for them there.
const hasReturns = tokenizer.pieces("\r").at(-1).tokens.length > 0 || tokenizer.separator?.includes("\r");
const toArea = (text) => (hasReturns ? text.replaceAll("\r", SYMBOLS["\r"]) : text);
const fromArea = (text) => (hasReturns ? text.replaceAll(SYMBOLS["\r"], "\r") : text);

function params() {
  return Object.fromEntries(CONTROLS.map(({ id }) => [id, Number($(id).value)]));
}

function setText(text) {
  story.text = text;
  Object.assign(state, { selected: null, pinned: false });
  work();
}

// Lets the model continue the text.
function proceed() {
  if (!story.tokens.length) setText(data.start);
  if (!state.pinned) state.selected = null;
  state.origin = story.pieces.length;
  Object.assign(state, { remaining: params().length, written: 0, started: performance.now() });
  work();
}

// Replaces a token of the text by another one, and lets the model continue from there.
function choose(piece, token) {
  story.cut(piece);
  story.append(token);
  Object.assign(state, { selected: null, pinned: false });
  proceed();
}

let working = false;

// Reads what is not read yet, and writes what remains to be written, without blocking the page.
async function work() {
  if (working) return;
  working = true;
  while (!story.isRead || state.remaining) {
    const end = performance.now() + SLICE;
    while ((!story.isRead || state.remaining) && performance.now() < end) step();
    update();
    await new Promise((done) => {
      const channel = new MessageChannel(); // unlike a timeout, a message has no least delay
      channel.port1.onmessage = done;
      channel.port2.postMessage(null);
    });
  }
  working = false;
  update();
}

function step() {
  if (!story.isRead) {
    story.read();
    return;
  }
  const position = story.tokens.length;
  const probs = samplingProbs(story.logits(position), params());
  story.append(draw(probs, uniform(params().seed, position)));
  state.remaining--;
  state.written++;
}

// ---------------------------------------------------------------- the text area and its colored copy

const spans = []; // of the pieces
const copies = []; // their texts

function updateText() {
  const { pieces } = story, area = $("text");
  let same = 0;
  while (same < pieces.length && copies[same] === pieces[same].text) same++;
  for (const span of spans.splice(same)) span.remove();
  copies.length = same;
  for (const { text, tokens } of pieces.slice(same)) {
    const span = element("span", tokens.length ? "heat" : "unknown", toArea(text));
    copies.push(text);
    spans.push(span);
    end.before(span);
  }
  const text = toArea(story.text);
  const { length } = area.value;
  if (!text.startsWith(area.value)) area.value = text;
  else if (text.length > length) area.setRangeText(text.slice(length), length, length, "preserve");
}

const end = element("span", "", "\u200b"); // gives the last line its height

function updateColors() {
  const strengths = state.view === "attention" ? attentionStrengths() : surpriseStrengths();
  spans.forEach((span, i) => setHeat(span, state.view === "plain" ? 0 : strengths[i] ?? 0));
  for (const span of $("copy").querySelectorAll(".selected")) span.classList.remove("selected");
  if (state.selected !== null) spans[state.selected]?.classList.add("selected");
}

// Returns the bits of each piece; undefined where the model has not predicted it.
function pieceBits() {
  let token = 0;
  return story.pieces.map(({ tokens }) => {
    const bits = story.bits.slice(token, (token += tokens.length));
    const known = tokens.length && bits.length === tokens.length && bits[0] !== undefined;
    return known ? sum(bits) : undefined;
  });
}

function surpriseStrengths() {
  return pieceBits().map((bits) => Math.min(1, (bits ?? 0) / MANY_BITS));
}

// ---------------------------------------------------------------- attention

// Returns the weights of a head, or the mean over the heads, on each piece before the selected one.
function attentionOf(layer, head) {
  const index = selectedToken();
  const weights = new Float64Array(story.pieces.length);
  if (!isPredicted(index)) return weights;
  const heads = head === MEAN ? [...Array(data.config.n_head).keys()] : [head];
  const maps = heads.map((h) => story.attention(index, layer, h));
  let token = 0;
  story.pieces.forEach(({ tokens }, piece) => {
    for (const _ of tokens) {
      for (const map of maps) weights[piece] += (map.weights[token - map.start] ?? 0) / heads.length;
      token++;
    }
  });
  return $("words").checked ? sumWords(weights) : weights;
}

// Gives every piece of a word the sum of their weights.
function sumWords(weights) {
  const kinds = story.pieces.map(({ text }) =>
    /^\s/u.test(text) ? "space" : /^[\p{L}\p{M}\p{N}]/u.test(text) ? "word" : "other");
  for (let first = 0, last; first < weights.length; first = last) {
    for (last = first; kinds[last] === kinds[first] && last < weights.length; ) last++;
    weights.fill(sum(weights.subarray(first, last)), first, last);
  }
  return weights;
}

function attentionStrengths() {
  return Array.from(attentionOf(state.layer, state.head), Math.sqrt);
}

const boxes = []; // one for each head, and one for the mean of each layer

function buildBoxes() {
  for (let layer = 0; layer < data.config.n_layer; layer++) {
    const row = element("div", "heads");
    for (let head = MEAN; head < data.config.n_head; head++) {
      const input = radio("head", layer === state.layer && head === state.head, () => {
        Object.assign(state, { layer, head });
        update();
      });
      const weight = element("span", "muted"), key = element("bdi", "token");
      const name = element("span", "", head === MEAN ? "mean" : `head ${head + 1}`);
      const node = element("label", "heat", input, element("span", "top", name, weight), key);
      boxes.push({ layer, head, node, weight, key });
      row.append(node);
    }
    $("layers").append(element("fieldset", "", element("legend", "", `Layer ${layer + 1}`), row));
  }
}

function updateAttention() {
  $("attention").hidden = $("attention-of-head").hidden = state.view !== "attention";
  if (state.view !== "attention") return;
  const weights = attentionOf(state.layer, state.head);
  const read = [...weights.keys()].filter((piece) => weights[piece] > 0);
  const largest = read.sort((a, b) => weights[b] - weights[a]).slice(0, TOP);
  const head = state.head === MEAN ? "mean of the heads" : `head ${state.head + 1}`;
  $("keys-heading").textContent = `Layer ${state.layer + 1}, ${head} looked at`;
  $("keys").replaceChildren(...largest.map((piece) => bar("li", contextLabel(piece), weights[piece])));
  for (const box of boxes) {
    const weights = attentionOf(box.layer, box.head), top = weights.indexOf(Math.max(...weights));
    setHeat(box.node, Math.sqrt(weights[top] ?? 0));
    box.weight.textContent = weights[top] ? `${Math.round(100 * weights[top])}%` : "";
    box.key.replaceChildren(...(weights[top] ? [contextLabel(top)] : []));
  }
}

// Returns a piece in bold among its neighbors.
function contextLabel(piece) {
  const part = (tag, className, first, last) =>
    element(tag, className, visible(story.pieces.slice(Math.max(0, first), last).map(({ text }) => text).join("")));
  return element("span", "", part("span", "muted", piece - 4, piece), part("b", "", piece, piece + 1),
    part("span", "muted", piece + 1, piece + 5));
}

// ---------------------------------------------------------------- what the model expected

// Returns the index of the first token of the selected piece.
function selectedToken() {
  return story.tokenIndex(state.selected ?? story.pieces.length);
}

function isPredicted(index) {
  return index > 0 && index <= story.predicted;
}

function nameOf(text) {
  return NAMES[text] ?? visible(text);
}

function tokenText(token) {
  const bytes = story.tokenizer.tokenBytes(token);
  const text = new TextDecoder().decode(bytes);
  if (!text.includes("\ufffd")) return text;
  return Array.from(bytes, (byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
}

// Returns why there are no probabilities for the selected piece, or "" if there are.
function obstacle(piece, index) {
  if (piece && !piece.tokens.length) return "The model does not know this character, and did not see it.";
  if (!index && piece) return "Nothing stands before the first character, so the model could not predict it.";
  if (!index) return "Type a text, or let the model begin.";
  return isPredicted(index) ? "" : "The model has not read this far yet.";
}

function updateInspector() {
  const place = state.selected ?? story.pieces.length, piece = story.pieces[place], index = selectedToken();
  $("inspect-heading").textContent = piece
    ? `What the model expected, in place of “${nameOf(piece.text)}”` : "What the model expects next";
  $("selected").textContent = obstacle(piece, index);
  $("probs-note").hidden = $("probs").hidden = Boolean($("selected").textContent);
  if ($("probs").hidden) return;
  const logits = story.logits(index), model = softmax(logits.slice()), drawn = samplingProbs(logits, params());
  const actual = piece ? story.tokens[index] : undefined;
  if (piece) {
    const bits = pieceBits()[place]?.toFixed(2) ?? "?";
    $("selected").textContent = `Its probability is ${percent(model[actual])}: ${bits} bits of surprise.`;
  }
  const shown = [...drawn.keys()].sort((a, b) => drawn[b] - drawn[a] || model[b] - model[a]).slice(0, TOP);
  if (piece && !shown.includes(actual)) shown.push(actual);
  $("probs").replaceChildren(...shown.map((token) => {
    const button = bar("button", `${nameOf(tokenText(token))}${token === actual ? " ✓" : ""}`, drawn[token]);
    Object.assign(button, { type: "button", title: "Continue the text from here with this token" });
    button.classList.toggle("actual", token === actual);
    button.addEventListener("click", () => choose(place, token));
    return element("li", "", button);
  }));
}

// ---------------------------------------------------------------- numbers, controls, and the rest of the page

function updateNumbers() {
  const bits = pieceBits().filter((b) => b !== undefined), count = story.pieces.length;
  const parts = [`${count.toLocaleString("en")} ${count === 1 ? "character" : "characters"}`];
  if (!story.isRead) parts.push(`reading: ${Math.floor((100 * story.predicted) / story.tokens.length)}\u202f%`);
  else if (bits.length) parts.push(`${(sum(bits) / bits.length).toFixed(2)} bits per character`);
  const speed = Math.round((1000 * state.written) / state.elapsed);
  if (state.written > 20) parts.push(`${speed.toLocaleString("en")} tokens a second`);
  $("numbers").textContent = parts.join(" · ");
  const unknown = [...new Set(story.pieces.filter((p) => !p.tokens.length).map((p) => p.text))];
  $("unknown").hidden = !unknown.length;
  const named = unknown.slice(0, 5).map((character) => `“${visible(character)}” (${codePoint(character)})`);
  $("unknown").textContent =
    `Not among the ${data.config.vocab_size} characters of this model, which does not see them: ${named.join(", ")}` +
    (unknown.length > 5 ? ", …" : "");
}

function update() {
  if (state.remaining) state.elapsed = performance.now() - state.started;
  updateText();
  updateColors();
  updateInspector();
  updateAttention();
  updateNumbers();
  $("go").textContent = state.remaining ? "Stop" : "Continue";
  $("retry").disabled = state.origin === null;
  if (state.remaining) $("editor").scrollTop = $("editor").scrollHeight;
}

function buildControls() {
  for (const { id, name, min, max, step, value, help } of CONTROLS) {
    const input = Object.assign(element("input", ""), { id, type: "range", min, max, step, value, title: help });
    const output = element("output", "", String(value)), label = element("label", "", name, output);
    label.htmlFor = id;
    input.setAttribute("aria-describedby", `${id}-help`);
    input.addEventListener("input", () => {
      output.textContent = input.value;
      update();
    });
    const note = Object.assign(element("p", "muted small", help), { id: `${id}-help` });
    $("controls").append(element("div", "", label, input, note));
  }
  $("topK").max = Math.min(100, data.config.vocab_size);
}

function buildViews() {
  for (const [view, { name }] of Object.entries(VIEWS)) {
    $("views").append(element("label", "", radio("view", view === state.view, () => setView(view)), name));
  }
}

function setView(view) {
  state.view = view;
  $("hint").textContent = VIEWS[view].hint;
  $("scale").replaceChildren(...VIEWS[view].scale.map(([strength, name]) => {
    const item = element("li", "heat", name);
    setHeat(item, strength);
    return item;
  }));
  update();
}

function buildAbout() {
  const { title, tagline, about } = data, line = (text) => visible(text).replaceAll("␣", " ");
  document.title = $("title").textContent = line(title);
  $("tagline").textContent = tagline;
  const terms = (rows) => rows.flatMap(([name, value]) =>
    [element("dt", "", name), element("dd", "", element("bdi", "", line(value)))]);
  $("facts").replaceChildren(...terms(about.facts));
  $("settings").replaceChildren(...terms(about.settings));
  const slider = $("sample-slider"), last = about.samples.length - 1;
  $("samples").hidden = last < 0;
  const show = () => {
    const { caption, text } = about.samples[slider.value];
    $("sample-caption").textContent = caption;
    $("sample").textContent = text;
    slider.setAttribute("aria-valuetext", caption);
  };
  Object.assign(slider, { max: last, value: last, hidden: last < 1 });
  slider.addEventListener("input", show);
  if (last >= 0) show();
}

// ---------------------------------------------------------------- events

function select(piece, pinned) {
  Object.assign(state, { selected: piece, pinned });
  update();
}

// Returns the index of the piece under the pointer, or null.
function pieceAt(event) {
  const span = document.elementsFromPoint(event.clientX, event.clientY).find((node) => node.parentNode === $("copy"));
  const piece = spans.indexOf(span);
  return piece < 0 ? null : piece;
}

// Returns the index of the piece after the caret, or null at the end of the text.
function pieceAtCaret() {
  let offset = 0;
  const piece = copies.findIndex((text) => (offset += toArea(text).length) > $("text").selectionStart);
  return piece < 0 ? null : piece;
}

$("text").addEventListener("input", () => {
  state.origin = null;
  state.remaining = 0;
  setText(fromArea($("text").value));
});
$("text").addEventListener("pointermove", (event) => {
  if (!state.pinned && event.pointerType === "mouse" && !event.buttons) select(pieceAt(event), false);
});
$("text").addEventListener("click", (event) => {
  const piece = pieceAt(event);
  select(piece, piece !== null && !(state.pinned && state.selected === piece));
});
$("text").addEventListener("keyup", (event) => {
  if (/^(Arrow|Home|End|Page)/.test(event.key)) select(pieceAtCaret(), pieceAtCaret() !== null);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") select(null, false);
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("go").click();
});
$("go").addEventListener("click", () => {
  if (state.remaining) state.remaining = 0;
  else proceed();
  update();
});
$("retry").addEventListener("click", () => {
  story.cut(state.origin);
  $("seed").value = (Number($("seed").value) % 1000) + 1;
  $("seed").dispatchEvent(new Event("input"));
  select(null, false);
  proceed();
});
$("clear").addEventListener("click", () => {
  Object.assign(state, { remaining: 0, origin: null });
  setText("");
  $("text").focus();
});
$("words").addEventListener("change", update);

$("copy").append(end);
buildControls();
buildViews();
buildBoxes();
buildAbout();
setView(state.view);
setText(data.text);
if (!data.text) proceed();
