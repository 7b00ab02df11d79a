// Sorts tables and stacks those that are too wide, filters the runs, and shows two responses to a prompt beside one another.
// Whatever a model or a person wrote is set as text, never as HTML.
"use strict";

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Tables. A column of numbers sorts by the number that its cells begin with, others as text in natural order; cells
// without a value stay last in both directions, and equal ones keep their order.

function compareCells(first, second, numeric, direction) {
  if (!first || !second) return Boolean(second) - Boolean(first);
  const order = numeric ? parseFloat(first) - parseFloat(second) : first.localeCompare(second, "en", {numeric: true});
  return direction * order;
}

function sortBy(header) {
  const table = header.closest("table"), body = table.tBodies[0], place = header.cellIndex;
  const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
  const numeric = header.classList.contains("number");
  const rows = Array.from(body.rows, row => [row.cells[place].textContent.trim(), row]);
  rows.sort((first, second) => compareCells(first[0], second[0], numeric, direction));
  body.append(...rows.map(([, row]) => row));
}

for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}

// A table that is wider than its place becomes a list of its rows, each value below the name of its column. On paper
// every table stays one: the style sheet sets it smaller.

const places = document.querySelectorAll(".scroll");

function stack() {
  for (const place of places) place.classList.remove("stacked");
  const wide = Array.from(places, place => place.scrollWidth > place.clientWidth + 1);
  places.forEach((place, number) => place.classList.toggle("stacked", wide[number]));
}

let width = document.body.clientWidth;
stack();
new ResizeObserver(() => {
  if (document.body.clientWidth === width) return;
  width = document.body.clientWidth;
  stack();
}).observe(document.body);

// What is folded is printed unfolded, but for the runs' settings, which are in runs.csv.

addEventListener("beforeprint", () => {
  for (const place of places) place.classList.remove("stacked");
});
addEventListener("afterprint", stack);

// Runs. A row stays if it holds every word of the filter, settings included.

const filter = document.getElementById("runs-filter");
const runs = Array.from(document.getElementById("runs-table").tBodies[0].rows, row => [row, row.textContent.toLowerCase()]);

function filterRuns() {
  const words = filter.value.toLowerCase().split(/\s+/);
  let left = 0;
  for (const [row, text] of runs) {
    row.hidden = !words.every(word => text.includes(word));
    left += !row.hidden;
  }
  document.getElementById("runs-count").textContent = filter.value.trim() ? `${left} of ${runs.length} runs` : "";
}

filter.addEventListener("input", filterRuns);

// The reader. Its data are described in salsa/report/reader.py, `reader`.

const data = JSON.parse(document.getElementById("reader-data").textContent);
const choice = {};
for (const name of ["benchmark", "prompt", "replicate", "left", "right"]) {
  choice[name] = document.getElementById(`reader-${name}`);
}
const chosen = name => Number(choice[name].value);

function fill(select, labels, first = 0) {
  select.replaceChildren(...labels.map((label, place) => {
    const option = element("option", "", label);
    option.value = place;
    return option;
  }));
  select.value = Math.min(first, labels.length - 1);
}

function fillPrompts() {
  fill(choice.prompt, data.benchmarks[chosen("benchmark")].prompts.map(prompt => prompt.id));
}

function number(value) {
  return value === null ? "none" : String(Number(value.toPrecision(3)));
}

function answer(model, response, turn) {
  const box = element("div", "answer-box");
  box.append(element("p", "label", data.models[model]));
  if (response === null) {
    box.append(element("p", "note", "This model did not answer this prompt."));
    return box;
  }
  const [texts, tokens, reasons] = response;
  box.append(element("p", "text", texts[turn]));
  box.append(element("p", "note", `${tokens[turn]} tokens, finish reason: ${reasons[turn]}`));
  return box;
}

function scores(model, response) {
  const line = element("p", "note", data.models[model]);
  if (response !== null) line.textContent += `: proxy reward ${number(response[3])}, gold reward ${number(response[4])}`;
  return line;
}

function spoken(winner) {
  if (winner === "tie") return "a tie";
  return winner === "error" ? "no readable verdict" : `${data.models[winner]} wins`;
}

// A prompt's score, of the left model: the mean over its verdicts, win 1, tie ½, loss 0; errors do not count.
function outcome(lines, left, right) {
  const values = lines.filter(line => line[2] !== "error").map(line => line[2] === "tie" ? 0.5 : Number(line[2] === left));
  if (!values.length) return "counts for neither";
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  return mean === 0.5 ? "counts as a tie" : `counts as a win of ${data.models[mean > 0.5 ? left : right]}`;
}

function judged(entry, lines, left, right, place) {
  const item = element("li");
  const parts = lines.map(([turn, shown, winner, grade]) =>
    `${turn === null ? "" : `turn ${turn}, `}${data.models[shown]} shown first: ${spoken(winner)}${grade ? ` (${grade})` : ""}`);
  item.append(element("span", "", `Judge ${entry.judge}. ${parts.join("; ")}. The prompt ${outcome(lines, left, right)}. `));
  item.append(element("code", "", `${entry.folder}/verdicts.jsonl`));
  for (const line of lines) if (line[4].length) item.append(said(entry, line, place));
  return item;
}

// What a judge was asked, as salsa/judges/openai.py fills its templates, and what it answered, each time it was asked.
function said(entry, [turn, first, winner, , answers], place) {
  const second = entry.pair.find(model => model !== first), unfolded = element("details", "words-of-judge");
  const which = `${turn === null ? "" : `Turn ${turn}, `}A is ${data.models[first]}, B is ${data.models[second]}`;
  unfolded.append(element("summary", "", `What ${entry.judge} was asked and said: ${which} (${spoken(winner)})`));
  answers.forEach((text, attempt) => {
    const again = attempt ? ` (asked again, ${attempt + 1} of ${answers.length})` : "";
    unfolded.append(element("p", "label", `The judge's answer${again}`), element("p", "text said", text));
  });
  if (entry.asked !== null) {
    unfolded.append(element("p", "label", "The prompt that it answered; asked again, it ended with a reminder of the verdicts' form"));
    unfolded.append(element("pre", "text", askedText(entry, turn || 1, [first, second], place)));
  }
  return unfolded;
}

function askedText(entry, last, models, [benchmark, prompt, replicate]) {
  const {turns, reference} = data.benchmarks[benchmark].prompts[prompt], values = {};
  for (let turn = 0; turn < last; turn++) {
    const suffix = last > 1 ? `_${turn + 1}` : "";
    values[`question${suffix}`] = turns[turn];
    ["a", "b"].forEach((letter, side) => {
      const response = data.responses[replicate][models[side]][benchmark][prompt];
      values[`answer_${letter}${suffix}`] = response === null ? "(not shown here)" : response[0][turn];
    });
    values[`reference${suffix}`] = (reference && reference[turn]) || "(none)";
  }
  const name = ["single", "two_turn"][last - 1] + (reference && reference[last - 1] ? "_reference" : "");
  return data.templates[entry.asked][name].replace(/\{(\w+)\}/g, (whole, key) => key in values ? values[key] : whole);
}

function verdicts(benchmark, prompt, replicate, left, right) {
  const about = data.verdicts.filter(entry => entry.replicate === replicate && entry.benchmark === benchmark);
  const items = about
    .filter(({pair, lines}) => left !== right && pair.includes(left) && pair.includes(right) && lines[prompt].length)
    .map(entry => judged(entry, entry.lines[prompt], left, right, [benchmark, prompt, replicate]));
  if (items.length) {
    const list = element("ul", "judged");
    list.append(...items);
    return list;
  }
  const met = new Set(about.filter(({pair}) => pair.includes(left)).flatMap(({pair}) => pair.filter(model => model !== left)));
  const names = Array.from(met).sort((a, b) => a - b).map(model => data.models[model]);
  const hint = names.length ? ` ${data.models[left]} was compared with: ${names.join("; ")}.` : "";
  return element("p", "note", `No judge compared these two on this prompt.${hint}`);
}

function show() {
  const [benchmark, place, replicate] = ["benchmark", "prompt", "replicate"].map(chosen);
  const models = [chosen("left"), chosen("right")];
  const prompt = data.benchmarks[benchmark].prompts[place];
  const responses = models.map(model => data.responses[replicate][model][benchmark][place]);
  const view = document.getElementById("reader-view");
  view.replaceChildren();
  prompt.turns.forEach((text, turn) => {
    const box = element("div", "turn"), asked = element("div", "prompt"), pair = element("div", "pair");
    asked.append(element("p", "label", prompt.turns.length > 1 ? `Prompt, turn ${turn + 1}` : "Prompt"));
    asked.append(element("p", "text", text));
    pair.append(...models.map((model, side) => answer(model, responses[side], turn)));
    box.append(asked, pair);
    view.append(box);
  });
  const rewards = element("div", "pair");
  rewards.append(...models.map((model, side) => scores(model, responses[side])));
  view.append(rewards, verdicts(benchmark, place, replicate, ...models));
}

// Show the policies that a claim compares; the link that was followed leads to the reader.
function read(policies) {
  for (const side of ["left", "right"]) {
    const place = data.models.indexOf(policies[side]);
    if (place >= 0) choice[side].value = place;
  }
  show();
}

function step(by) {
  const count = choice.prompt.options.length;
  choice.prompt.value = (chosen("prompt") + by + count) % count;
  show();
}

if (data.benchmarks.length) {
  fill(choice.benchmark, data.benchmarks.map(benchmark => benchmark.name));
  fill(choice.replicate, data.replicates);
  fill(choice.left, data.models);
  fill(choice.right, data.models, 1);
  fillPrompts();
  choice.benchmark.addEventListener("change", fillPrompts);
  for (const select of Object.values(choice)) select.addEventListener("change", show);
  document.getElementById("reader-previous").addEventListener("click", () => step(-1));
  document.getElementById("reader-next").addEventListener("click", () => step(1));
  show();
  for (const link of document.querySelectorAll("a.read")) link.addEventListener("click", () => read(link.dataset));
} else {
  document.getElementById("reader-view").append(element("p", "note", "This study has no benchmark."));
}
