// The panel: where the chosen token looks, head by head, and what each layer would have said.

import { getJson } from './api.js';
import { list, look, probability, visible } from './tokens.js';
import { headName, layerName, onLanguage, percent, word } from './words.js';

const MOST = 6;
const find = id => document.getElementById(id);
const heads = find('heads');
let chosen = -1, view = 'itself', weights = null, lens = null, at = null, locked = null, asked = null;

export const chosenIndex = () => chosen;

export async function choose(index, looksInside, report) {
  chosen = index;
  find('how').hidden = index >= 0;
  find('chosen').hidden = index < 0;
  if (index < 0) {
    asked?.abort();
    look(null);
    return;
  }
  title();
  if (!looksInside) return;
  weights = lens = at = locked = null;
  heads.replaceChildren();
  find('most').replaceChildren();
  drawLens();
  asked?.abort();
  const mine = asked = new AbortController();
  look([], index);
  try {
    await Promise.all([askAttention(mine.signal), askLens(mine.signal)]);
  } catch (error) {
    if (!mine.signal.aborted) report(error);
  }
}

const idsBefore = end => list.slice(0, end).map(token => token.id);

async function askAttention(signal) {
  const end = view === 'itself' ? chosen + 1 : chosen;
  if (end === 0) {
    weights = null;
    drawAttention();
    return;
  }
  weights = (await getJson('/api/attention', { tokens: idsBefore(end) }, signal)).weights;
  drawAttention();
}

async function askLens(signal) {
  lens = null;
  if (chosen > 0) {
    const body = { tokens: idsBefore(chosen), target: list[chosen].id };
    lens = (await getJson('/api/lens', body, signal)).layers;
  }
  drawLens();
}

function title() {
  const token = list[chosen];
  find('chosen-piece').textContent = visible(token.piece);
  const chance = probability(token);
  find('chosen-chance').textContent = chance === null ? word('no_chance') : percent(chance);
  for (const button of document.querySelectorAll('#views button')) {
    button.setAttribute('aria-pressed', button.value === view);
  }
}

function drawAttention() {
  heads.replaceChildren();
  heads.hidden = weights === null;
  if (!weights) {
    find('head-now').textContent = word('first_token');
    find('most').replaceChildren();
    look([], chosen);
    return;
  }
  heads.style.setProperty('--heads', weights[0].length);
  weights.forEach((layer, number) => {
    const row = add(heads, 'div', 'heads-row');
    row.setAttribute('role', 'row');
    add(row, 'span', 'soft', String(number + 1)).setAttribute('role', 'rowheader');
    layer.forEach((row_, head) => {
      const cell = add(row, 'button', 'cell');
      cell.type = 'button';
      cell.tabIndex = number || head ? -1 : 0;
      cell.setAttribute('role', 'gridcell');
      cell.setAttribute('aria-label', headName(number, head));
      cell.dataset.layer = number;
      cell.dataset.head = head;
      cell.style.setProperty('--look', sharpness(row_).toFixed(3));
    });
  });
  showHead(null);
}

// How much a head looks at one token, beside itself and the first one, which idle heads look at.
function sharpness(row) {
  const others = row.slice(1, view === 'itself' ? -1 : undefined);
  return others.length ? Math.max(...others) / 1000 : 0;
}

function showHead(which) {
  at = which;
  const rows = which ? [weights[which.layer][which.head]] : weights.flat();
  const mean = rows[0].map((_, place) => rows.reduce((sum, row) => sum + row[place], 0) / rows.length / 1000);
  find('head-now').textContent = which ? headName(which.layer, which.head) : word('all_heads');
  for (const cell of heads.querySelectorAll('.cell')) {
    const here = which && +cell.dataset.layer === which.layer && +cell.dataset.head === which.head;
    cell.classList.toggle('on', Boolean(here));
    cell.setAttribute('aria-selected', Boolean(here));
  }
  look(mean, chosen);
  const best = mean.map((weight, place) => [weight, place]).sort((a, b) => b[0] - a[0]).slice(0, MOST);
  const shown = find('most');
  shown.replaceChildren();
  for (const [weight, place] of best) {
    if (weight < 0.005) continue;
    const row = add(shown, 'li');
    add(row, 'span', 'piece', visible(list[place].piece));
    add(add(row, 'span', 'track'), 'i').style.width = `${100 * weight}%`;
    add(row, 'span', 'chance', percent(weight));
  }
}

function drawLens() {
  const table = find('lens');
  table.replaceChildren();
  if (!lens) return;
  const top = add(add(table, 'thead'), 'tr');
  for (const name of ['', word('best_guesses'), word('this_token')]) add(top, 'th', '', name);
  const body = add(table, 'tbody');
  lens.forEach((layer, number) => {
    const row = add(body, 'tr');
    add(row, 'th', '', layerName(number, lens.length));
    const guesses = add(row, 'td', 'guesses');
    for (const [id, piece, log] of layer.top.slice(0, 3)) {
      const guess = add(guesses, 'span', id === list[chosen].id ? 'piece mine' : 'piece', visible(piece));
      guess.style.setProperty('--look', Math.sqrt(Math.exp(log)).toFixed(3));
      guess.title = percent(Math.exp(log));
    }
    add(row, 'td', 'chance', percent(Math.exp(layer.log)));
  });
}

const headOf = event => {
  const cell = weights && event.target.closest('.cell');
  return cell && { layer: +cell.dataset.layer, head: +cell.dataset.head };
};
const same = (a, b) => a && b && a.layer === b.layer && a.head === b.head;

heads.addEventListener('pointerover', event => {
  const which = event.pointerType === 'mouse' && headOf(event);
  if (which) showHead(which);
});
heads.addEventListener('pointerleave', () => { if (weights) showHead(locked); });
heads.addEventListener('focusin', event => {
  const which = headOf(event);
  if (which && event.target.matches(':focus-visible')) showHead(which);
});
heads.addEventListener('focusout', event => {
  if (weights && !heads.contains(event.relatedTarget)) showHead(locked);
});
heads.addEventListener('click', event => {
  const which = headOf(event);
  if (!which) return;
  locked = same(locked, which) ? null : which;
  showHead(locked);
});
heads.addEventListener('keydown', event => {
  const which = headOf(event);
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!which || !step) return;
  event.preventDefault();
  const layer = which.layer + step[0], head = which.head + step[1];
  const next = heads.querySelector(`.cell[data-layer="${layer}"][data-head="${head}"]`);
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
find('views').addEventListener('click', async event => {
  if (!event.target.value) return;
  view = event.target.value;
  locked = null;
  title();
  await askAttention(asked?.signal).catch(() => {});
});
onLanguage(() => {
  if (chosen < 0) return;
  title();
  drawLens();
  if (weights) showHead(at);
  else drawAttention();
});

function add(parent, tag, name, text) {
  const node = parent.appendChild(document.createElement(tag));
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}
