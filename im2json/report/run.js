"use strict";
const examples = JSON.parse(document.getElementById("data").textContent);
const get = (id) => document.getElementById(id);
const BATCH = 10; // examples that are drawn at a time, as the reader comes to them
const orders = {
  worst: (a, b) => a.f1 - b.f1,
  mistake: (a, b) => b.mistake - a.mistake,
  least: (a, b) => a.least - b.least,
  id: (a, b) => (a.id < b.id ? -1 : 1),
};
let shown = examples, drawn = 0;

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function json(lines, title, wrong) {
  const column = element("div"), body = element("div", undefined, "json");
  for (const [depth, head, leaf, state, sure] of lines) {
    const line = element("div", head);
    line.style.setProperty("--depth", depth);
    if (leaf) line.append(element("span", leaf, state === 1 ? wrong : ""));
    if (sure !== null) line.append(element("i", (100 * sure).toFixed(sure > 0.999 ? 2 : 1) + " %"));
    body.append(line);
  }
  column.append(element("h4", title), body);
  return column;
}

function draw(example) {
  const card = element("article", undefined, "example"), title = element("h3", example.id);
  const [right, predicted, wanted] = example.right;
  const errors = Object.entries(example.errors).map(([name, count]) => name + (count > 1 ? " x " + count : ""));
  title.append(element("small", `F1 ${example.f1.toFixed(3)}, ${right} right of ${predicted} predicted, ${wanted} wanted`));
  if (errors.length) title.append(element("small", errors.join(", ")));
  const side = element("div"), picture = element("img");
  picture.alt = "the document";
  picture.decoding = "async";
  picture.src = "data:image/jpeg;base64," + example.picture;
  side.append(picture);
  card.append(title, side, json(example.target, "target", "missing"),
    json(example.prediction, example.how === "strict" ? "prediction" : `prediction, ${example.how}`, "wrong"));
  return card;
}

function more() {
  get("examples").append(...shown.slice(drawn, drawn + BATCH).map(draw));
  drawn = Math.min(drawn + BATCH, shown.length);
}

function near() {
  while (drawn < shown.length && get("end").getBoundingClientRect().top < 2 * window.innerHeight) more();
}

function choose() {
  const field = get("field").value, error = get("error").value, words = get("search").value.toLowerCase();
  shown = examples.filter((example) =>
    (!field || example.fields.includes(field)) && (!error || example.errors[error]) && example.search.includes(words));
  shown.sort(orders[get("order").value]);
  get("count").textContent = `${shown.length} of ${examples.length}`;
  get("examples").replaceChildren();
  drawn = 0;
  more();
  near();
}

function options(id, names) {
  const counts = new Map();
  for (const name of names) counts.set(name, (counts.get(name) || 0) + 1);
  for (const [name, count] of [...counts].sort((a, b) => b[1] - a[1])) {
    const option = element("option", `${name} (${count})`);
    option.value = name;
    get(id).append(option);
  }
}

options("field", examples.flatMap((example) => example.fields));
options("error", examples.flatMap((example) => Object.keys(example.errors)));
for (const id of ["order", "field", "error", "search"]) get(id).addEventListener("input", choose);
addEventListener("scroll", near, { passive: true });
addEventListener("resize", near);
choose();
