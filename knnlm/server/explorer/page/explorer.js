// The explorer. Whatever comes from a model or a corpus becomes text by textContent, never markup.
// A search is made once; k, T and λ are arithmetic here, the same as in knnlm/knn/mixing.py and trust.py.

const $ = (id) => document.getElementById(id);
const FULL_BITS = 6; // of change from which on a token has its full colour
const UNCHANGED_BITS = 0.2; // below which it has none: 15 % more or less
const state = { store: null, layer: "", setting: null, tokens: [], texts: new Map(), chosen: -1, voters: null, cuts: [], byLayer: new Map(), stop: null, documents: new Map(), overlaps: null, without: null, generation: null };

// Distributions

const floats = (text) => new Float32Array(Uint8Array.from(atob(text), (character) => character.charCodeAt(0)).buffer);

/** λ of one token: moved by the layer's gate, if it is on (docs/mixing.md). */
function lambdaOf({ distances, votes }, { k, lambda, gate }) {
  if (!gate) return lambda;
  const different = new Set(votes.slice(0, Math.min(k, state.store.nearest))).size;
  const moved = gate.offset + gate.distance * Math.sqrt(Math.max(distances[0], 0)) + gate.different * Math.log(different);
  return Math.min((1 + Math.tanh((Math.log(lambda) - Math.log1p(-lambda) + moved) / 2)) / 2, 1 - 1e-4);
}

/** Evidence without the neighbours of one document; those beyond k follow up. */
function masked(evidence, document) {
  if (document === null) return evidence;
  if (evidence.masked?.document === document) return evidence.masked;
  const kept = [...evidence.documents.keys()].filter((i) => evidence.documents[i] !== document);
  const [distances, votes, rows, documents] = ["distances", "votes", "rows", "documents"].map((name) => kept.map((i) => evidence[name][i]));
  evidence.masked = { ...evidence, distances, votes, rows, documents, document };
  return evidence.masked;
}

/** The evidence as it is shown: without the document that is switched off. */
const seen = (evidence) => masked(evidence, state.without);

/** The three distributions of a token's evidence under a setting; probabilities at its M tokens. λ is multiplied by the trust. */
function predict(evidence, setting, trust) {
  const { distances, votes, lm } = evidence;
  const { k, temperature } = setting;
  const weights = new Float64Array(Math.min(k, distances.length));
  const knn = new Float64Array(lm.length);
  let total = 0;
  for (let i = 0; i < weights.length; i++) {
    weights[i] = Math.exp((distances[0] - distances[i]) / temperature);
    knn[votes[i]] += weights[i];
    total += weights[i];
  }
  for (let i = 0; i < weights.length; i++) weights[i] /= total;
  const lambda = total ? trust * lambdaOf(evidence, setting) : 0; // no neighbour at all: the plain model
  const mixed = lm.map((p, at) => {
    knn[at] = total ? knn[at] / total : 0;
    return lambda * knn[at] + (1 - lambda) * p;
  });
  return { lm, knn, mixed, weights, lambda };
}

const byText = () => Boolean(state.setting.gate && own().by_text);

/** log p of the token at full trust, minus that of the model alone. */
function gainOf(evidence) {
  const { lm, mixed } = predict(evidence, state.setting, 1);
  const [before, after] = [lm[evidence.at], mixed[evidence.at]];
  return before === after ? 0 : Math.log(after / before);
}

/** Tell each token the trust in the memory that the text before it gives: with all documents, also where one is off. */
function measureTrust(from = 0) {
  const { first, switch: change, silent } = state.store.trust;
  let trust = state.tokens[from - 1]?.trustAfter ?? first;
  for (const token of state.tokens.slice(from)) {
    if (token.evidence) {
      token.trust = !byText() ? 1 : trust < silent ? 0 : trust;
      const odds = Math.log(trust / (1 - trust)) + (byText() ? gainOf(token.evidence) : 0);
      trust = change + ((1 - 2 * change) * (1 + Math.tanh(odds / 2))) / 2;
    }
    token.trustAfter = trust;
  }
}

/** What each document among the k nearest gave to the token: its share of p, and log2 p minus that without it. */
function supports(evidence, setting, trust) {
  const { distances, votes, documents, lm, at } = evidence;
  const weights = Array.from(distances, (distance) => Math.exp((distances[0] - distance) / setting.temperature));
  const [totals, hits] = [[0], [0]];
  for (const [i, weight] of weights.entries()) {
    totals.push(totals[i] + weight);
    hits.push(hits[i] + (votes[i] === at ? weight : 0));
  }
  const k = Math.min(setting.k, weights.length);
  const lambda = k ? trust * lambdaOf(evidence, setting) : 0;
  const mix = (hit, total) => (total ? (lambda * hit) / total : 0) + (1 - lambda) * lm[at];
  const p = mix(hits[k], totals[k]);
  const places = new Map();
  documents.forEach((document, i) => (places.has(document) ? places.get(document).push(i) : places.set(document, [i])));
  const found = [];
  for (const [document, all] of places) {
    if (all[0] >= k) continue;
    const gone = all.filter((i, before) => i - before < setting.k); // the others move up
    const sum = (chosen) => chosen.reduce((total, i) => total + weights[i], 0);
    const votesFor = (chosen) => chosen.filter((i) => votes[i] === at);
    const end = Math.min(setting.k + gone.length, weights.length);
    const without =
      all[0] < state.store.nearest // then λ may be another one, and sums that differ would round
        ? predict(masked({ ...evidence, masked: null }, document), setting, trust).mixed[at]
        : mix(hits[end] - sum(votesFor(gone)), totals[end] - sum(gone));
    const share = totals[k] && p ? (lambda * sum(votesFor(all.filter((i) => i < k)))) / totals[k] / p : 0;
    found.push({ document, share, gain: p === without ? 0 : Math.log2(p / without) });
  }
  return found;
}

/** Tokens as the server tells them, ready for `predict`. */
function unpack(answer) {
  for (const [token, text] of Object.entries(answer.texts)) state.texts.set(Number(token), text);
  for (const [document, name] of Object.entries(answer.documents)) state.documents.set(Number(document), name);
  return answer.tokens.map(({ token, text, evidence }) => {
    if (!evidence) return { token, text, evidence };
    const lm = Float64Array.from(floats(evidence.lm), Math.exp);
    return { token, text, evidence: { ...evidence, lm, distances: floats(evidence.distances), at: evidence.tokens.indexOf(token) } };
  });
}

// Words

const LOOKS = new Map([[" ", "␣"], ["\n", "↵"], ["\r", "␍"], ["\t", "⇥"]]);
const printable = (text) => text.replace(/[^\n\t\P{Cc}]|[\p{Cf}\p{Cs}]/gu, "\ufffd");
const visible = (text) => printable(text).replace(/[ \n\r\t]/g, (space) => LOOKS.get(space)) || "(empty)";
const flow = (text) => printable(text).replaceAll("\n", "↵ ").replaceAll("\t", "⇥ ");
const count = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
const significant = (number, digits = 4) => Number(number.toPrecision(digits)).toLocaleString("en", { maximumSignificantDigits: digits });

function percent(p) {
  if (p === 0) return "0 %";
  if (p < 1e-7) return "< 0.00001 %";
  return `${(100 * p).toFixed(p >= 0.1 ? 0 : 1 - Math.floor(Math.log10(100 * p)))} %`;
}

function change(lm, mixed) {
  if (lm === mixed) return "left this token as it was";
  if (!mixed) return "made this token impossible";
  const [ratio, word] = mixed > lm ? [mixed / lm, "likelier"] : [lm / mixed, "less likely"];
  return ratio < 1.05 ? "hardly changed this token" : `made this token ${significant(ratio, 2)} times ${word}`;
}

/** An element with attributes and children; strings become text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A token in a line of its own: its white space is shown, and paler. */
function label(text) {
  const parts = visible(text).split(/([␣↵␍⇥]+)/).filter(Boolean);
  return make("code", {}, ...parts.map((part) => (/^[␣↵␍⇥]/.test(part) ? make("span", { class: "ws" }, part) : part)));
}

const share = (p) => make("data", { value: p }, percent(p));

// The server

async function ask(path, body, signal) {
  for (;;) {
    const key = sessionStorage.getItem("knnlm-key");
    const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    if (response.ok) return response;
    if (response.status !== 401) {
      const told = await response.json().catch(() => null);
      throw new Error(told?.error?.message ?? `the server answered with ${response.status}`);
    }
    sessionStorage.setItem("knnlm-key", await askForKey());
  }
}

function askForKey() {
  $("key").value = "";
  $("ask").showModal();
  return new Promise((give, refuse) => {
    $("ask").onclose = () => ($("ask").returnValue === "given" ? give($("key").value) : refuse(new Error("without its key the server answers nothing")));
  });
}

/** The events of a stream, each a JSON object. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part.replace(/^data: /, ""));
  }
}

/** Do something with the server, one thing at a time; what fails is told. */
async function busy(words, work) {
  if (state.stop) return;
  state.stop = new AbortController();
  $("error").hidden = true;
  $("status").textContent = words;
  showButtons();
  try {
    await work(state.stop.signal);
  } catch (error) {
    if (error.name !== "AbortError") {
      $("error").textContent = error instanceof TypeError ? "The server cannot be reached." : `Sorry: ${error.message}.`;
      $("error").hidden = false;
    }
  } finally {
    state.stop = null;
    showButtons();
    showSummary();
  }
}

// Reading and going on

const explain = () => busy("Asking the model and its memory …", explainText);

async function explainText(signal) {
  if (!$("text").value) throw new Error("there is no text yet");
  if (!state.store) await loadStore();
  const answer = await (await ask("explorer/explain", { text: $("text").value, layer: state.layer }, signal)).json();
  if (state.generation !== answer.generation) sources.clear();
  state.generation = answer.generation;
  state.byLayer.clear();
  state.texts.clear();
  state.cuts = [];
  state.without = null;
  state.overlaps = null;
  show(unpack(answer));
  read(true);
  await measureOverlaps(signal);
}

const goOn = () =>
  busy("Going on …", async (signal) => {
    if ($("tokens").hidden) await explainText(signal);
    const drawn = $("how").value === "drawn" ? { temperature_lm: 1, top_p: 0.9, seed: Math.floor(Math.random() * 2 ** 53) } : {};
    const { gate, ...setting } = state.setting;
    const from = { tokens: state.tokens.map((one) => one.token), layer: state.layer, generation: state.generation, ...setting, gated: Boolean(gate) };
    const response = await ask("explorer/continue", { ...from, max_new_tokens: Number($("count").value), ...drawn }, signal);
    state.byLayer.clear();
    switchOff(null);
    state.cuts.push(state.tokens.length);
    $("tokens").append(cut());
    state.overlaps = null; // those of the text as it was
    showDocuments();
    try {
      for await (const event of events(response)) addToken(event);
    } finally {
      await measureOverlaps(); // of a text that was stopped too
    }
  });

async function measureOverlaps(signal) {
  const tokens = state.tokens.map((one) => one.token);
  state.overlaps = (await (await ask("explorer/overlaps", { tokens, generation: state.generation }, signal)).json()).overlaps;
  showDocuments();
}

function addToken(event) {
  if (event.error) throw new Error(event.error.message);
  const [token] = unpack(event);
  const box = $("tokens");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  state.tokens.push(token);
  measureTrust(state.tokens.length - 1);
  box.append(tokenElement(token, state.tokens.length - 1, "new"));
  paint(state.tokens.length - 1);
  if (atEnd) box.scrollTop = box.scrollHeight;
  if (event.finish_reason !== "stop") $("text").value += token.text; // an end token is no text
}

/** Between the text as it is typed and the text as it is explained. */
function read(on) {
  for (const id of ["text", "text-hint"]) $(id).hidden = on;
  for (const id of ["tokens", "legend"]) $(id).hidden = !on;
  showButtons();
  if (on) $("tokens").querySelector("[tabindex='0']")?.focus({ preventScroll: true });
  else $("text").focus();
}

function showButtons() {
  const reading = !$("tokens").hidden;
  $("explain").hidden = reading;
  $("edit").hidden = !reading;
  $("stop").hidden = !state.stop;
  $("continue").hidden = Boolean(state.stop);
  for (const id of ["explain", "edit", "layer"]) $(id).disabled = Boolean(state.stop);
}

const changeLayer = () =>
  busy("Searching another layer …", async (signal) => {
    const name = $("layer").value;
    state.byLayer.set(state.layer, state.tokens);
    try {
      if (state.tokens.length && !state.byLayer.has(name)) {
        const answer = await (await ask("explorer/explain", { tokens: state.tokens.map((one) => one.token), layer: name, generation: state.generation }, signal)).json();
        state.byLayer.set(name, unpack(answer));
      }
    } catch (error) {
      $("layer").value = state.layer;
      throw error;
    }
    setLayer(name);
    if (state.tokens.length) show(state.byLayer.get(name), state.chosen);
  });

// The tokens

function show(tokens, chosen) {
  state.tokens = tokens;
  measureTrust();
  state.chosen = chosen ?? mostHelped(tokens);
  state.voters = null;
  $("tokens").replaceChildren(...tokens.flatMap((token, at) => [...(state.cuts.includes(at) ? [cut()] : []), tokenElement(token, at)]));
  choose(state.chosen);
  update();
}

/** The token whose probability the memory raised most: what a new text opens with. */
function mostHelped(tokens) {
  const gains = tokens.map(({ evidence, trust }) => {
    if (!evidence) return -Infinity;
    const { lm, mixed } = predict(seen(evidence), state.setting, trust);
    return mixed[evidence.at] - lm[evidence.at];
  });
  return gains.indexOf(Math.max(...gains));
}

const cut = () => make("span", { class: "cut", "aria-hidden": "true" });

function tokenElement(token, at, kind = "") {
  const parts = printable(token.text).split(/(\n|\t)/).filter(Boolean);
  const shown = parts.map((part) => (part === "\n" ? [sign("↵"), "\n"] : part === "\t" ? [sign("⇥"), " "] : part)).flat();
  const span = make("span", { role: "option", tabindex: at === Math.max(state.chosen, 0) ? 0 : -1, class: kind, "aria-selected": false });
  span.append(...(shown.length ? shown : [sign("·")])); // of a character in several tokens the last one has all
  return span;
}

const sign = (text) => make("span", { class: "sign" }, text);
const options = () => [...$("tokens").querySelectorAll("[role=option]")];

/** Colour and words of one token. */
function paint(at, element = options()[at]) {
  const { text, evidence, trust } = state.tokens[at];
  element.classList.remove("helped", "hurt", "same", "unknown");
  if (!evidence) {
    element.classList.add("unknown");
    element.title = "The first token: nothing predicts it";
    return;
  }
  const { lm, mixed } = predict(seen(evidence), state.setting, trust);
  const [before, after] = [lm[evidence.at], mixed[evidence.at]];
  const bits = before === after ? 0 : Math.log2(after / before);
  element.classList.add(Math.abs(bits) < UNCHANGED_BITS ? "same" : bits > 0 ? "helped" : "hurt");
  element.style.setProperty("--amount", Math.min(Math.abs(bits) / FULL_BITS, 1).toFixed(3));
  element.dataset.lm = before;
  element.dataset.mixed = after;
  element.title = `${visible(text)}: ${percent(before)} by the model, ${percent(after)} with the memory`;
}

function showSummary() {
  const told = state.tokens.filter((one) => one.evidence).map(({ evidence, trust }) => [evidence, predict(seen(evidence), state.setting, trust)]);
  if (!told.length) return $("status").replaceChildren();
  const perplexity = (name) => Math.exp(-told.reduce((sum, [{ at }, under]) => sum + Math.log(under[name][at]), 0) / told.length);
  const [plain, mixed] = [perplexity("lm"), perplexity("mixed")];
  const number = (value) => make("data", { value }, make("b", {}, Number.isFinite(value) ? significant(value, 3) : "∞"));
  $("status").replaceChildren(`${count(state.tokens.length, "token")}. Perplexity `, number(plain), " for the model alone, ", number(mixed), " with its memory", state.without === null ? "." : ` without ${documentName(state.without)}.`);
}

/** After a change of the setting: everything that depends on it. */
function update() {
  measureTrust();
  options().forEach((element, at) => paint(at, element));
  if (!state.stop) showSummary();
  showToken();
  showDocumentsSoon();
}

let due = 0;
const updateSoon = () => {
  cancelAnimationFrame(due);
  due = requestAnimationFrame(update);
};

function choose(at, focus = false) {
  const all = options();
  for (const [place, element] of all.entries()) {
    element.setAttribute("aria-selected", place === at);
    element.tabIndex = place === Math.max(at, 0) ? 0 : -1;
  }
  if (at !== state.chosen) state.voters = null;
  state.chosen = at < all.length ? at : -1;
  if (focus) all[at]?.focus();
}

function open(at) {
  choose(at, true);
  showToken();
}

/** Where an arrow key leads: along the text, or to the token above or below. */
function moved(key, from) {
  const all = options();
  if (key === "Home") return 0;
  if (key === "End") return all.length - 1;
  if (key === "ArrowLeft") return Math.max(from - 1, 0);
  if (key === "ArrowRight") return Math.min(from + 1, all.length - 1);
  const boxes = all.map((element) => element.getClientRects()[0]);
  const { left, top } = boxes[from];
  const tops = boxes.map((box) => box.top).filter((other) => (key === "ArrowUp" ? other < top - 4 : other > top + 4));
  if (!tops.length) return from;
  const line = key === "ArrowUp" ? Math.max(...tops) : Math.min(...tops);
  const near = boxes.map((box, at) => [Math.abs(box.top - line) < 4 ? Math.abs(box.left - left) : Infinity, at]);
  return near.reduce((best, one) => (one[0] < best[0] ? one : best))[1];
}

// One token

function showToken() {
  const chosen = state.tokens[state.chosen];
  $("intro").hidden = Boolean(chosen);
  $("token").hidden = !chosen;
  if (!chosen) return;
  const { text, evidence, trust } = chosen;
  const before = state.tokens.slice(0, state.chosen).map((one) => one.text).join("");
  const mark = make("mark", { class: options()[state.chosen].className }, visible(text));
  $("context").replaceChildren(before.length > 90 ? `…${flow(before.slice(-90).replace(/^\S{0,20}(?=\s)/, ""))}` : flow(before), mark);
  for (const element of document.querySelectorAll(".three, .three-hint, .neighbors-head, #neighbors-note, #neighbors")) element.hidden = !evidence;
  if (!evidence) {
    $("detail-title").textContent = "The first token: nothing predicts it";
    return;
  }
  const shown = seen(evidence);
  const under = predict(shown, state.setting, trust);
  $("detail-title").textContent = `The memory ${change(under.lm[evidence.at], under.mixed[evidence.at])}`;
  $("knn-how").textContent = count(under.weights.length, "neighbour");
  const parts = `${percent(under.lambda)} memory, ${percent(1 - under.lambda)} model`;
  $("mixed-how").replaceChildren(parts, ...(byText() ? ["; trust ", share(trust)] : []));
  const top = Math.max(...under.lm, ...under.knn);
  for (const name of ["lm", "knn", "mixed"]) {
    $(`${name}-share`).replaceChildren(share(under[name][evidence.at]));
    $(name).replaceChildren(...shares(under[name], shown, top));
  }
  showNeighbors(shown, under.weights);
}

/** The likeliest tokens of a distribution, and the one that came, each a bar; what has votes can be asked for them. */
function shares(values, evidence, top) {
  const order = [...values.keys()].sort((a, b) => values[b] - values[a] || a - b).slice(0, state.store.likeliest).filter((at) => values[at] > 0);
  const voted = new Set(evidence.votes.slice(0, state.setting.k));
  const row = (at) => {
    const pressable = voted.has(at);
    const element = make(pressable ? "button" : "div", { class: `share${at === evidence.at ? " came" : ""}` }, label(state.texts.get(evidence.tokens[at])), share(values[at]));
    element.style.setProperty("--share", values[at] / top);
    if (pressable) {
      element.setAttribute("aria-pressed", state.voters === at);
      element.title = "Show the neighbours that vote for it";
      element.onclick = () => showVoters(state.voters === at ? null : at);
    }
    return make("li", {}, element);
  };
  const rows = order.map(row);
  if (!order.includes(evidence.at)) rows.push(make("li", { class: "gap", "aria-hidden": "true" }), row(evidence.at));
  return rows;
}

function showVoters(at) {
  const list = document.activeElement?.closest("ol")?.id;
  const place = [...document.querySelectorAll(`#${list} li`)].indexOf(document.activeElement?.closest("li"));
  state.voters = at;
  showToken();
  document.querySelectorAll(`#${list} li`)[place]?.querySelector("button")?.focus();
}

const sources = new Map(); // by row of the datastore, in the generation of the explanation
let turn = 0;

async function showNeighbors(evidence, weights) {
  const mine = ++turn;
  const { voters } = state;
  const all = [...weights.keys()].filter((i) => voters === null || evidence.votes[i] === voters);
  const shown = all.slice(0, state.store.neighbors);
  $("all").hidden = voters === null;
  $("neighbors-note").textContent = neighborsNote(all, shown, weights, voters === null ? null : state.texts.get(evidence.tokens[voters]));
  const missing = shown.map((i) => evidence.rows[i]).filter((row) => !sources.has(row));
  $("neighbors").setAttribute("aria-busy", missing.length > 0);
  if (missing.length) {
    const told = await ask("explorer/sources", { rows: missing, generation: state.generation }).then((response) => response.json(), () => null);
    told?.sources.forEach((source, at) => sources.set(missing[at], source));
    if (mine !== turn) return; // something else was opened meanwhile
    if (!told) $("neighbors-note").append(" Their text could not be fetched.");
  }
  $("neighbors").setAttribute("aria-busy", false);
  const heaviest = weights[0];
  $("neighbors").replaceChildren(...shown.filter((i) => sources.has(evidence.rows[i])).map((i) => neighbor(evidence, i, weights[i], heaviest)));
}

function neighborsNote(all, shown, weights, token) {
  if (!weights.length) return "The search found none.";
  const mass = percent(shown.reduce((sum, i) => sum + weights[i], 0));
  const nearest = `the ${weights.length.toLocaleString("en")} nearest contexts`;
  if (token === null) return `Of ${nearest} the first ${shown.length}, which have ${mass} of the votes’ weight.`;
  const first = shown.length < all.length ? `; the first ${shown.length} have` : ", with";
  return `${all.length.toLocaleString("en")} of ${nearest} vote for “${visible(token)}”${first} ${mass} of the weight.`;
}

function neighbor(evidence, i, weight, heaviest) {
  const source = sources.get(evidence.rows[i]);
  const vote = label(source.token);
  vote.className = "vote";
  const bar = make("span", { class: "bar", "aria-hidden": "true" });
  bar.style.setProperty("--share", weight / heaviest);
  const where = [
    make("span", {}, bar, "weight ", make("b", {}, share(weight))),
    make("span", {}, "distance ", make("b", {}, make("data", { value: evidence.distances[i] }, significant(evidence.distances[i], 3)))),
    make("span", {}, flow(source.document), ", ", make("b", {}, `no. ${source.number}`)),
  ];
  const text = make("p", { dir: "auto" }, `…${flow(source.before.trimStart())}`, vote, flow(source.after));
  return make("li", { class: evidence.votes[i] === evidence.at ? "agrees" : "" }, text, make("div", { class: "where" }, ...where));
}

// The documents

const DOCUMENTS = 12;
const documentName = (document) => `${flow(state.documents.get(document)[0])}, no. ${state.documents.get(document)[1]}`;

const bits = (gain) => (Number.isFinite(gain) ? `${gain.toFixed(1)} bits` : gain > 0 ? "∞: impossible without it" : "−∞: impossible with it");

/** The documents behind the text, the one that is worth most first: its mean share, its gain in bits, where it helps. */
function cited() {
  const found = new Map();
  const told = state.tokens.filter((one) => one.evidence);
  state.tokens.forEach(({ evidence, trust }, at) => {
    if (!evidence) return;
    for (const { document, share, gain } of supports(evidence, state.setting, trust)) {
      const all = found.get(document) ?? { document, share: 0, gain: 0, places: [] };
      all.share += share / told.length;
      all.gain += gain;
      if (gain >= UNCHANGED_BITS) all.places.push(at);
      found.set(document, all);
    }
  });
  // Impossible with it in one place, and without it in another: worth nothing that could be told.
  for (const one of found.values()) if (Number.isNaN(one.gain)) one.gain = 0;
  return [...found.values()].sort((a, b) => (a.gain === b.gain ? 0 : b.gain - a.gain));
}

let later = 0;
const showDocumentsSoon = () => {
  clearTimeout(later);
  later = setTimeout(showDocuments, 120);
};

function showDocuments() {
  clearTimeout(later);
  const all = state.tokens.length ? cited() : [];
  const shown = all.slice(0, DOCUMENTS);
  const off = all.find((one) => one.document === state.without);
  if (off && !shown.includes(off)) shown.push(off);
  const focused = document.activeElement?.closest("#documents button")?.dataset.document;
  $("documents-card").hidden = !shown.length;
  $("documents-note").textContent = `${count(all.length, "document")} ${all.length === 1 ? "has" : "have"} neighbours that vote here. Point at one to see the tokens it supports; switch it off to see the text without it.`;
  $("documents").replaceChildren(...shown.map(documentElement));
  $("with-all").hidden = state.without === null;
  mark([]);
  document.querySelector(`#documents button[data-document="${focused}"]`)?.focus();
}

function documentElement({ document, share: part, gain, places }) {
  const facts = make("span", { class: "where" }, make("span", {}, "share ", make("b", {}, share(part))), make("span", {}, "worth ", make("b", {}, make("data", { value: gain }, bits(gain)))), make("span", {}, "verbatim ", make("b", {}, state.overlaps ? count(state.overlaps[document] ?? 0, "token") : "…")));
  const button = make("button", { class: "quiet", "data-document": document, "aria-pressed": state.without === document }, "Without");
  button.setAttribute("aria-label", `Without ${documentName(document)}`);
  button.onclick = () => switchOff(state.without === document ? null : document);
  const element = make("li", { class: state.without === document ? "off" : "" }, make("div", {}, make("span", { class: "name", dir: "auto" }, documentName(document)), facts), button);
  element.onmouseenter = element.onfocusin = () => mark(places);
  element.onmouseleave = element.onfocusout = () => mark([]);
  return element;
}

/** Mark the tokens that a document supports. */
const mark = (places) => options().forEach((element, at) => element.classList.toggle("supported", places.includes(at)));

function switchOff(document) {
  state.without = document;
  update();
  showDocuments();
}

// The setting

const sorted = (values) => [...new Set(values)].sort((a, b) => a - b);
const powers = [...Array(20).keys()].flatMap((i) => [2 ** i, 3 * 2 ** i]);
const DIALS = {
  lambda: { symbol: "λ", words: "weight of the memory", digits: 3, values: (own) => sorted([...Array(101).keys()].map((i) => i / 100).concat(own)) },
  k: { symbol: "k", words: "neighbours that vote", digits: 4, values: (own, depth) => sorted([...powers.filter((k) => k < depth), depth, own]) },
  temperature: { symbol: "T", words: "how evenly they vote", digits: 4, values: (own) => [...Array(49).keys()].map((i) => own * 2 ** ((i - 24) / 4)) },
};

const own = () => state.store.layers.find((one) => one.name === state.layer);

function setLayer(name) {
  state.layer = $("layer").value = name;
  $("dials").replaceChildren(...Object.keys(DIALS).map(dial));
  $("fitted").textContent = own().fitted ? "▲ as the datastore’s evaluation fitted it for this layer" : "▲ as the server was started; nothing else was fitted for this layer";
  reset();
}

function reset() {
  const { k, temperature, lambda, gate } = own();
  state.setting = { k, temperature, lambda, gate };
  $("gate").checked = Boolean(gate);
  $("gated").hidden = !gate;
  for (const name of Object.keys(DIALS)) showDial(name);
  updateSoon();
}

function dial(name) {
  const { symbol, words, values } = DIALS[name];
  const steps = values(own()[name], own().depth);
  const input = make("input", { type: "range", id: name, min: 0, max: steps.length - 1, step: 1 });
  input.steps = steps;
  input.oninput = () => {
    state.setting[name] = steps[input.value];
    showDial(name);
    updateSoon();
  };
  const tick = make("span", { class: "tick", "aria-hidden": "true" });
  tick.style.setProperty("--at", steps.indexOf(own()[name]) / (steps.length - 1 || 1));
  const heading = make("label", { for: name }, make("b", {}, symbol), ` ${words}`);
  return make("div", { class: "dial" }, heading, make("output", { for: name, id: `${name}-value` }), make("div", { class: "track" }, input, tick));
}

function showDial(name) {
  const value = state.setting[name];
  const input = $(name);
  const shown = significant(value, DIALS[name].digits);
  input.value = input.steps.indexOf(value);
  input.setAttribute("aria-valuetext", shown);
  input.style.setProperty("--fill", `${(100 * input.value) / input.max}%`);
  $(`${name}-value`).replaceChildren(make("data", { value }, shown));
}

// The beginning

function listen() {
  $("explain").onclick = explain;
  $("edit").onclick = () => read(false);
  $("continue").onclick = goOn;
  $("stop").onclick = () => state.stop?.abort();
  $("reset").onclick = reset;
  $("layer").onchange = changeLayer;
  $("gate").onchange = () => {
    state.setting.gate = $("gate").checked ? own().gate : null;
    updateSoon();
  };
  $("all").onclick = () => showVoters(null);
  $("with-all").onclick = () => switchOff(null);
  $("text").onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) explain();
  };
  $("tokens").onclick = (event) => {
    const at = options().indexOf(event.target.closest("[role=option]"));
    if (at < 0) return;
    open(at);
    if (matchMedia("(max-width: 980px)").matches) $("detail").scrollIntoView();
  };
  $("tokens").onkeydown = (event) => {
    const from = options().indexOf(event.target.closest("[role=option]"));
    if (from < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    if (/^(Arrow|Home$|End$)/.test(event.key)) open(moved(event.key, from));
    else if (event.key === "Enter" || event.key === " ") open(from);
    else return;
    event.preventDefault();
  };
}

async function loadStore() {
  state.store = await (await ask("explorer/store")).json();
  const { model, store, keys, documents, layers, max_characters } = state.store;
  const parts = [make("b", {}, store), `: ${count(keys, "context")} of ${count(documents, "document")}, for the model `, make("b", {}, model)];
  $("store").replaceChildren(...parts);
  $("text").maxLength = max_characters;
  $("layer").replaceChildren(...layers.map(({ name, first }) => make("option", { value: name }, first ? `${name} (chosen)` : name)));
  setLayer(layers.find((one) => one.first).name);
}

listen();
busy("", loadStore);
