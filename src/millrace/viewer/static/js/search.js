// The search for a text in conversations, whose answer comes file by file.

import { lines } from "./api.js";
import { known, whole } from "./format.js";

const EVERY = 120; // ms between two looks at what was found

/** A search that is under way or over. `show` is called when there is more to show. */
export class Search {
  constructor(asked, parameters, show) {
    Object.assign(this, { asked, rows: [], columns: [], read: 0, files: 0, full: false, done: false, problems: [] });
    this.control = new AbortController();
    this.show = show;
    this.timer = 0;
    this.run(parameters);
  }

  async run(parameters) {
    try {
      for await (const found of lines("api/search", parameters, this.control.signal)) this.take(found);
    } catch (error) {
      this.stopped = this.control.signal.aborted;
      if (!this.stopped) this.problems.push(`the search broke off: ${error.message}`);
    }
    this.done = true;
    clearTimeout(this.timer);
    this.show(this);
  }

  take(found) {
    if (found.columns) this.columns = found.columns;
    if (found.problem) this.problems.push(found.problem);
    if (found.rows === undefined) return;
    this.rows.push(
      ...found.rows.map((row) => Object.fromEntries(this.columns.map((name, index) => [name, row[index]]))),
    );
    Object.assign(this, { read: found.read, files: found.files, full: found.full });
    this.timer ||= setTimeout(() => {
      this.timer = 0;
      this.show(this);
    }, EVERY);
  }

  stop() {
    this.control.abort();
  }

  /** What was found, in the order of a column; `-` before it is the largest first. */
  sorted(sort) {
    const column = sort.replace("-", "");
    const sign = sort.startsWith("-") ? -1 : 1;
    const least = (value) => (known(value) ? 0 : 1);
    const order = (a, b) =>
      least(a[column]) - least(b[column]) || (a[column] < b[column] ? -sign : a[column] > b[column] ? sign : 0);
    return [...this.rows].sort(order);
  }

  /** How far it is, for people. */
  get progress() {
    const read = `${whole(this.read)} of ${whole(this.files)} files`;
    if (this.full) return `the first ${whole(this.rows.length)}; narrow the search for others`;
    if (this.stopped) return `stopped after ${read}`;
    return this.done ? `all ${whole(this.files)} files searched` : `searching: ${read}, newest first (Esc stops)`;
  }
}
