// Tables sort by a click on a head; long ones filter; legends choose a curve.
const numeric = (text) => {
  const found = text.replace(/,/g, '').match(/^[-+]?\d*\.?\d+(e[-+]?\d+)?/i);
  return found ? parseFloat(found[0]) : NaN;
};

function sortBy(table, column) {
  const head = table.tHead.rows[0].cells[column];
  const up = head.getAttribute('aria-sort') !== 'ascending';
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const body = table.tBodies[0];
  const value = (row) => row.cells[column].textContent.trim();
  const rows = Array.from(body.rows);
  rows.sort((a, b) => {
    const [x, y] = [numeric(value(a)), numeric(value(b))];
    const known = (isNaN(x) ? 1 : 0) - (isNaN(y) ? 1 : 0);
    if (known) return known;  // Words stay below numbers either way.
    const order = isNaN(x) ? value(a).localeCompare(value(b)) : x - y;
    return up ? order : -order;
  });
  body.append(...rows);
}

function prepareTable(table) {
  for (const cell of table.querySelectorAll('td')) {
    if (cell.textContent.length < 15) cell.style.whiteSpace = 'nowrap';
  }
  if (!table.tHead || table.tBodies[0].rows.length < 4) return;
  table.setAttribute('data-sortable', '');
  Array.from(table.tHead.rows[0].cells).forEach((cell, column) => {
    cell.tabIndex = 0;
    cell.title = 'Sort';
    cell.addEventListener('click', () => sortBy(table, column));
    cell.addEventListener('keydown', (event) => {
      if (event.key === 'Enter') sortBy(table, column);
    });
  });
  if (table.tBodies[0].rows.length < 15) return;
  const filter = document.createElement('input');
  filter.className = 'filter';
  filter.type = 'search';
  filter.placeholder = 'Filter rows, e.g. soba';
  filter.setAttribute('aria-label', 'Filter rows');
  filter.addEventListener('input', () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    for (const row of table.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
  (table.closest('.md-typeset__scrollwrap') || table).before(filter);
}

function prepareCurves(figure) {
  let held = null;
  const show = (curve) => {
    figure.classList.toggle('chosen', curve !== null);
    for (const part of figure.querySelectorAll('[data-curve]')) {
      part.classList.toggle('on', part.dataset.curve === curve);
    }
  };
  for (const button of figure.querySelectorAll('button')) {
    const curve = button.dataset.curve;
    button.addEventListener('pointerenter', () => show(curve));
    button.addEventListener('pointerleave', () => show(held));
    button.addEventListener('click', () => {
      held = held === curve ? null : curve;
      show(held);
    });
  }
}

document.querySelectorAll('.md-typeset table').forEach(prepareTable);
document.querySelectorAll('figure.curves').forEach(prepareCurves);
