"use strict";
// Lists the items of the page's data block, filters them and shows their answers side by side.
// Every text of a model or a data set becomes a text node: no element is made from it.

const DATA = JSON.parse(document.getElementById("data").textContent);
// A word, a number or one other character, with the space before it.
const WORD = /\s*(?:[\p{L}\p{N}]+(?:[.,'’-][\p{L}\p{N}]+)*|[^\s\p{L}\p{N}])|\s+$/gu;
const PAGE_SIZE = 200; // rows added at a time
const MOST_CELLS = 4e6; // of the table that aligns two answers
const VERDICTS = {
  lost: "lost",
  gained: "gained",
  right: "both right",
  wrong: "both wrong",
  changed: "answer changed",
};
const FILTERS = ["words", "set", "model", "variant", "verdict"];
const byId = (id) => document.getElementById(id);

const COMPARED = DATA.variants.map((_, place) => place).slice(1);
const ENTRIES = DATA.sets.flatMap((set) => set.items.map((item) => entryOf(set, item)));
const shown = { entries: [], rows: [], current: -1 };
const unfolded = { gold: false, prompt: false };

// --- What is known of an item ------------------------------------------------------------

function entryOf(set, item) {
  const texts = [item.id, item.question ?? "", ...item.golds, ...(item.options ?? []).flat()];
  const outputs = item.answers.map((a) => a.different.map(textOf).join("\n").toLowerCase());
  const text = texts.join("\n").toLowerCase();
  return { set, item, key: `${set.name}/${item.id}`, text, outputs };
}

/** What the model wrote, or the option that it chose. */
function textOf(answer) {
  return answer.output ?? answer.parsed ?? "";
}

function answerOf(item, model, variant) {
  const { different, of } = item.answers[model];
  return different[of[variant]];
}

/** One of lost, gained, right, wrong: the variant's score beside the baseline's. */
function verdictOf(item, model, variant) {
  const before = answerOf(item, model, 0).score;
  const after = answerOf(item, model, variant).score;
  if (after !== before) return after < before ? "lost" : "gained";
  return after > 0 ? "right" : "wrong";
}

function isChanged(item, model, variant) {
  const before = answerOf(item, model, 0);
  const after = answerOf(item, model, variant);
  return before.parsed !== after.parsed || before.status !== after.status;
}

function hasVerdict(item, model, variant, verdict) {
  if (verdict === "changed") return isChanged(item, model, variant);
  return verdictOf(item, model, variant) === verdict;
}

// --- Elements ----------------------------------------------------------------------------

/** A new element; texts among the children become text nodes. */
function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function span(name, ...children) {
  return element("span", { class: name }, ...children);
}

function badge(verdict) {
  const marks = { lost: "▼ ", gained: "▲ ", right: "✓ ", wrong: "✗ ", changed: "≠ " };
  const names = { right: "right", wrong: "wrong", changed: "changed" };
  const mark = element("span", { "aria-hidden": "true" }, marks[verdict]);
  return span(`badge ${verdict}`, mark, names[verdict] ?? verdict);
}

function names(list) {
  if (list.length > 3) {
    const all = list.length === COMPARED.length;
    return all ? `all ${list.length} variants` : `${list.length} of ${COMPARED.length} variants`;
  }
  return list.map((place) => DATA.variants[place]).join(", ");
}

// --- Filters -----------------------------------------------------------------------------

function chosen() {
  const radio = document.querySelector("input[name=verdict]:checked");
  const verdict = radio ? radio.value : "";
  return {
    words: byId("words").value,
    set: byId("set").value,
    model: byId("model").value,
    variant: byId("variant").value,
    verdict,
  };
}

function modelsOf(filter) {
  const all = DATA.models.map((_, place) => place);
  return filter.model ? [DATA.models.indexOf(filter.model)] : all;
}

function variantsOf(filter) {
  return filter.variant ? [DATA.variants.indexOf(filter.variant)] : COMPARED;
}

function pairsOf(filter) {
  return modelsOf(filter).flatMap((m) => variantsOf(filter).map((v) => [m, v]));
}

function withoutVerdict(filter) {
  const words = filter.words.toLowerCase().split(/\s+/).filter(Boolean);
  const models = modelsOf(filter);
  return ENTRIES.filter((entry) => {
    if (filter.set && entry.set.name !== filter.set) return false;
    const texts = [entry.text, ...models.map((m) => entry.outputs[m])];
    return words.every((word) => texts.some((text) => text.includes(word)));
  });
}

function offered(select, everything, values, labels) {
  select.append(element("option", { value: "" }, everything));
  values.forEach((value, i) => select.append(element("option", { value }, labels[i])));
}

function makeFilters() {
  const sets = DATA.sets.map((set) => set.name);
  const variants = COMPARED.map((place) => DATA.variants[place]);
  offered(byId("set"), "all", sets, DATA.sets.map((set) => set.label));
  offered(byId("model"), "all", DATA.models, DATA.models);
  offered(byId("variant"), "any", variants, variants);
  byId("baseline").textContent = DATA.baseline;
  const field = byId("verdicts");
  field.hidden = COMPARED.length === 0;
  byId("variant").parentElement.hidden = field.hidden;
  for (const [value, label] of [["", "all"], ...Object.entries(VERDICTS)]) {
    const radio = element("input", { type: "radio", name: "verdict", value });
    radio.checked = value === "";
    const number = element("span", { class: "number", "data-of": value });
    field.append(element("label", { class: value || "all" }, radio, `${label} `, number));
  }
}

function countVerdicts(filter, entries) {
  const pairs = pairsOf(filter);
  for (const number of document.querySelectorAll("#verdicts .number")) {
    const verdict = number.dataset.of;
    const fitting = entries.filter(
      ({ item }) => !verdict || pairs.some(([m, v]) => hasVerdict(item, m, v, verdict)),
    );
    number.textContent = fitting.length;
  }
}

// --- The list ----------------------------------------------------------------------------

function list() {
  const filter = chosen();
  const entries = withoutVerdict(filter);
  const pairs = pairsOf(filter);
  countVerdicts(filter, entries);
  shown.entries = entries.filter(
    ({ item }) =>
      !filter.verdict || pairs.some(([m, v]) => hasVerdict(item, m, v, filter.verdict)),
  );
  shown.rows = [];
  shown.current = -1;
  byId("items").replaceChildren();
  byId("open-all").textContent = "Open all shown";
  const one = ENTRIES.length === 1 ? "item" : "items";
  byId("count").textContent = `${shown.entries.length} of ${ENTRIES.length} ${one}`;
  showMore(filter);
}

function showMore(filter = chosen()) {
  const from = shown.rows.length;
  for (const entry of shown.entries.slice(from, from + PAGE_SIZE)) {
    const row = rowOf(entry, filter);
    shown.rows.push(row);
    byId("items").append(row.line);
  }
  const left = shown.entries.length - shown.rows.length;
  byId("more").hidden = left === 0;
  byId("more").textContent = `Show ${Math.min(left, PAGE_SIZE)} more of ${left}`;
}

function rowOf(entry, filter) {
  const place = shown.rows.length;
  const body = element("div", { class: "body", id: `body-${place}` });
  const head = element("button", {
    type: "button",
    "aria-expanded": "false",
    "aria-controls": body.id,
  });
  const { item, set } = entry;
  const question = element("span", { class: "question", dir: "auto" }, item.question ?? item.id);
  head.append(span("set", set.label), " ", question);
  const stories = modelsOf(filter).map((m) => storyOf(item, m, variantsOf(filter)));
  head.append(span("stories", ...stories));
  head.addEventListener("click", () => {
    shown.current = place;
    toggle(place);
    remember();
  });
  head.addEventListener("focus", () => (shown.current = place));
  body.hidden = true;
  const line = element("li", {}, element("h2", {}, head), body);
  return { entry, filter, head, body, line };
}

/** One line on a model: is the baseline right, and what becomes of the item in the variants. */
function storyOf(item, model, variants) {
  const line = span("story", span("model", DATA.models[model]), " ");
  line.append(badge(answerOf(item, model, 0).score > 0 ? "right" : "wrong"));
  const of = (test) => variants.filter(test);
  const flips = (v) => ["lost", "gained"].includes(verdictOf(item, model, v));
  for (const verdict of ["lost", "gained"]) {
    const where = of((v) => verdictOf(item, model, v) === verdict);
    if (where.length) line.append(" ", badge(verdict), ` ${names(where)}`);
  }
  const changed = of((v) => !flips(v) && isChanged(item, model, v));
  if (changed.length) line.append(" ", badge("changed"), ` ${names(changed)}`);
  return line;
}

function toggle(place, open = shown.rows[place].body.hidden) {
  const { entry, filter, head, body, line } = shown.rows[place];
  head.setAttribute("aria-expanded", String(open));
  line.classList.toggle("open", open);
  body.hidden = !open;
  body.replaceChildren(...(open ? contentOf(entry, filter) : []));
}

// --- One item ----------------------------------------------------------------------------

function contentOf({ set, item }, filter) {
  const parts = [];
  const table = item.options && item.answers.every((a) => a.different.some((d) => d.shares));
  if (item.options) parts.push(optionsOf(item));
  parts.push(goldOf(item), promptOf(set, item));
  const models = modelsOf(filter).map((model) => {
    const body = table ? sharesOf(set, item, model) : cardsOf(set, item, model);
    return element("div", {}, element("h3", {}, DATA.models[model]), body);
  });
  parts.push(element("div", { class: table ? "models tables" : "models" }, ...models));
  const note = "Probability among the options, in per cent; a frame marks the chosen option.";
  if (table) parts.push(element("p", { class: "note" }, note));
  return parts;
}

function optionsOf(item) {
  const lines = item.options.filter(([label, text]) => label !== text);
  const parts = lines.flatMap(([label, text]) => [
    element("dt", {}, label),
    element("dd", { dir: "auto" }, text),
  ]);
  return element("dl", { class: "options" }, ...parts);
}

function folded(kind, title, ...children) {
  const made = element("details", { class: kind }, element("summary", {}, title), ...children);
  made.open = unfolded[kind];
  return made;
}

function goldOf(item) {
  const options = new Map(item.options ?? []);
  const golds = item.golds.map((gold) => {
    const text = options.get(gold) ?? gold;
    return element("li", { dir: "auto" }, text === gold ? gold : `${gold}: ${text}`);
  });
  const none = element("p", {}, "None: the passage does not say.");
  return folded("gold", "Right answer", golds.length ? element("ul", {}, ...golds) : none);
}

function promptOf(set, item) {
  if (!item.prompts) {
    return folded("prompt", "Prompt", element("p", {}, `No prompt is on record. Item ${item.id}.`));
  }
  const parts = item.prompts.flatMap((own, place) => {
    const title = element("p", {}, `To ${DATA.models[place]}:`);
    return item.prompts.length > 1 ? [title, textBlock(own)] : [textBlock(own)];
  });
  if (set.opening) {
    const title = element("summary", {}, "Its beginning, the same for every item of the set");
    parts.unshift(element("details", {}, title, textBlock(set.opening)));
  }
  const name = element("p", { class: "note" }, `Item ${item.id}.`);
  return folded("prompt", "Prompt, as asked", ...parts, name);
}

function textBlock(text) {
  return element("pre", { tabindex: "0", role: "group", "aria-label": "prompt" }, text);
}

/** Variants by their answers, the baseline's first: [[place, …], …]. */
function groupsOf(item, model) {
  const groups = new Map();
  item.answers[model].of.forEach((answer, variant) => {
    groups.set(answer, [...(groups.get(answer) ?? []), variant]);
  });
  return [...groups.values()];
}

function badgesOf(item, model, variant) {
  const verdict = verdictOf(item, model, variant);
  const right = answerOf(item, model, variant).score > 0 ? "right" : "wrong";
  const flips = ["lost", "gained"].includes(verdict);
  const found = [badge(flips ? verdict : right)];
  if (!flips && isChanged(item, model, variant)) found.push(badge("changed"));
  return found.flatMap((made) => [made, " "]);
}

function invalidOf(set, model, variants) {
  const problems = set.invalid[DATA.models[model]];
  return variants
    .map((place) => DATA.variants[place])
    .filter((name) => Object.hasOwn(problems, name))
    .map((name) => element("p", { class: "invalid" }, `${name} is invalid: ${problems[name]}`));
}

function cardsOf(set, item, model) {
  const before = textOf(answerOf(item, model, 0));
  const cards = groupsOf(item, model).map((variants) => {
    const [first, ...equal] = variants;
    const answer = answerOf(item, model, first);
    const title = element("h4", {}, DATA.variants[first]);
    const card = element("article", { class: `card ${verdictOf(item, model, first)}` }, title);
    card.append(element("p", { class: "badges" }, ...badgesOf(item, model, first)));
    card.append(answerText(before, textOf(answer)));
    const note = noteOf(answer);
    if (note) card.append(element("p", { class: "note" }, note));
    const same = equal.map((place) => DATA.variants[place]).join(", ");
    if (same) card.append(element("p", { class: "same" }, `The same answer: ${same}`));
    card.append(...invalidOf(set, model, variants));
    return card;
  });
  return element("div", { class: "cards" }, ...cards);
}

function noteOf(answer) {
  const notes = [];
  if (answer.status === "unparsed") notes.push("no answer could be read");
  if (answer.status === "abstained") notes.push("read as: there is no answer");
  const isRead = answer.output !== undefined && answer.parsed !== null;
  if (isRead) notes.push(`read as: ${answer.parsed}`);
  if (answer.end === "length") notes.push("cut off at the longest length");
  if (answer.end === "nonfinite") notes.push("ended by a number that is not finite");
  if (answer.f1 !== undefined) notes.push(`F1 ${answer.f1.toFixed(2)}`);
  return notes.join(" · ");
}

function answerText(before, text) {
  const made = element("p", { class: "text", dir: "auto" });
  if (!text) made.append(span("note", "(empty)"));
  for (const [kind, part] of differing(before, text)) {
    const words = part.trimStart();
    made.append(part.slice(0, part.length - words.length));
    made.append(kind === "same" ? words : element(kind, {}, words));
  }
  return made;
}

/** Options' probabilities: a line a variant, a column an option. */
function sharesOf(set, item, model) {
  const options = item.options.map(([label]) => element("th", { scope: "col" }, label));
  const corner = element("th", { scope: "col" }, "variant");
  const head = element("thead", {}, element("tr", {}, corner, ...options));
  const before = answerOf(item, model, 0).parsed;
  const lines = DATA.variants.map((name, variant) => {
    const answer = answerOf(item, model, variant);
    const badges = badgesOf(item, model, variant);
    const title = element("th", { scope: "row" }, span("name", name), " ", ...badges);
    const cells = item.options.map(([label], place) => {
      const share = answer.shares?.[place];
      const cell = element("td", {}, share === undefined ? "–" : percent(share));
      if (share !== undefined) cell.style.setProperty("--share", share);
      if (label === answer.parsed) {
        cell.classList.add("chosen");
        cell.append(span("unseen", " chosen"));
        if (label !== before) cell.classList.add("changed");
      }
      return cell;
    });
    return element("tr", {}, title, ...cells);
  });
  const table = element("table", {}, head, element("tbody", {}, ...lines));
  const name = `options' probabilities, ${DATA.models[model]}`;
  const box = element("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": name });
  box.append(table, ...invalidOf(set, model, DATA.variants.map((_, place) => place)));
  return box;
}

function percent(share) {
  return (100 * share).toFixed(1);
}

// --- Words that differ -------------------------------------------------------------------

/** The new text in pieces: [["same" | "mark" | "del", text], …]; del is missing from it. */
function differing(before, after) {
  const [old, now] = [before, after].map((text) => text.match(WORD) ?? []);
  const alike = (a, b) => a.trim() === b.trim();
  let start = 0;
  while (start < old.length && start < now.length && alike(old[start], now[start])) start += 1;
  let end = 0;
  const most = Math.min(old.length, now.length) - start;
  while (end < most && alike(old[old.length - 1 - end], now[now.length - 1 - end])) end += 1;
  const middle = aligned(old.slice(start, old.length - end), now.slice(start, now.length - end));
  const pieces = [
    ...now.slice(0, start).map((word) => ["same", word]),
    ...middle,
    ...now.slice(now.length - end).map((word) => ["same", word]),
  ];
  return joined(pieces);
}

/** The longest common subsequence of two lists of words, as pieces. */
function aligned(old, now) {
  const width = now.length + 1;
  if (!old.length || !now.length || old.length * now.length > MOST_CELLS) {
    return [...old.map((word) => ["del", word]), ...now.map((word) => ["mark", word])];
  }
  const table = new Uint32Array((old.length + 1) * width);
  for (let i = old.length - 1; i >= 0; i -= 1) {
    for (let j = now.length - 1; j >= 0; j -= 1) {
      const same = old[i].trim() === now[j].trim();
      table[i * width + j] = same
        ? table[(i + 1) * width + j + 1] + 1
        : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    }
  }
  const pieces = [];
  let [i, j] = [0, 0];
  while (i < old.length || j < now.length) {
    if (i < old.length && j < now.length && old[i].trim() === now[j].trim()) {
      pieces.push(["same", now[j]]);
      [i, j] = [i + 1, j + 1];
    } else if (j === now.length || (i < old.length && left(i, j))) {
      pieces.push(["del", old[i]]);
      i += 1;
    } else {
      pieces.push(["mark", now[j]]);
      j += 1;
    }
  }
  return pieces;

  function left(row, column) {
    return table[(row + 1) * width + column] >= table[row * width + column + 1];
  }
}

/** Neighbours of one kind as one piece; words that others replace are left out. */
function joined(pieces) {
  const runs = [];
  for (const [kind, text] of pieces) {
    const last = runs.at(-1);
    if (last?.[0] === kind) last[1] += text;
    else runs.push([kind, text]);
  }
  const isMark = (run) => run?.[0] === "mark";
  return runs.filter(
    ([kind], place) => kind !== "del" || !(isMark(runs[place - 1]) || isMark(runs[place + 1])),
  );
}

// --- Keys, address -----------------------------------------------------------------------

function move(step) {
  if (!shown.rows.length) return;
  const from = shown.current;
  const last = shown.entries.length - 1;
  const to = Math.max(0, Math.min(last, from + step));
  while (to >= shown.rows.length) showMore();
  const reading = from >= 0 && from !== to && !shown.rows[from].body.hidden;
  if (reading) {
    toggle(from, false);
    toggle(to, true);
  }
  const { head, line } = shown.rows[to];
  head.focus({ preventScroll: true });
  line.scrollIntoView({ block: reading ? "start" : "nearest" });
  if (reading) remember();
}

function close() {
  const place = shown.current;
  if (place < 0 || shown.rows[place].body.hidden) return;
  toggle(place, false);
  shown.rows[place].head.focus();
  remember();
}

function unfold(kind) {
  unfolded[kind] = !unfolded[kind];
  for (const part of document.querySelectorAll(`details.${kind}`)) part.open = unfolded[kind];
}

const ACTIONS = {
  "/": () => byId("words").focus(),
  j: () => move(1),
  k: () => move(-1),
  g: () => unfold("gold"),
  p: () => unfold("prompt"),
  Escape: close,
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const typing = event.target.matches("input[type=search], select");
  if (typing) {
    const leaves = event.key === "Escape" && !event.target.value;
    if (event.target.id === "words" && (leaves || event.key === "Enter")) {
      event.preventDefault();
      move(shown.current < 0 ? 1 : 0);
    }
    return;
  }
  const action = byId("use-keys").checked || event.key === "Escape" ? ACTIONS[event.key] : null;
  if (action) {
    event.preventDefault();
    action();
  }
}

/** Keep the filters and the open item in the address, so that they can be handed on. */
function remember() {
  const row = shown.rows[shown.current];
  const state = { ...chosen(), item: row && !row.body.hidden ? row.entry.key : "" };
  const kept = Object.entries(state).filter(([, value]) => value);
  const address = new URLSearchParams(kept).toString();
  try {
    history.replaceState(null, "", `#${address}`);
  } catch {
    // A browser that lets no local page do that does without.
  }
}

function recall() {
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const name of FILTERS) {
    const value = kept.get(name) ?? "";
    if (name === "words") byId(name).value = value;
    else if (name === "verdict") {
      for (const radio of document.querySelectorAll("input[name=verdict]")) {
        radio.checked = radio.value === (value in VERDICTS ? value : "");
      }
    } else {
      const values = [...byId(name).options].map((option) => option.value);
      byId(name).value = values.includes(value) ? value : "";
    }
  }
  list();
  const place = shown.entries.findIndex((entry) => entry.key === kept.get("item"));
  if (place < 0) return;
  while (place >= shown.rows.length) showMore();
  shown.current = place;
  toggle(place, true);
  shown.rows[place].line.scrollIntoView();
}

function start() {
  makeFilters();
  recall();
  byId("filters").addEventListener("input", () => {
    list();
    remember();
  });
  byId("more").addEventListener("click", () => {
    const place = shown.rows.length;
    showMore();
    shown.rows[place].head.focus();
  });
  byId("open-all").addEventListener("click", () => {
    const open = shown.rows.some((row) => row.body.hidden);
    shown.rows.forEach((_, place) => toggle(place, open));
    byId("open-all").textContent = open ? "Close all" : "Open all shown";
  });
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", recall);
}

start();
