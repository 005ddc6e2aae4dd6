// The branches of a sample as a tree: what its sequences have in common, and where they part.

import { chart, font, palette, tip } from "./charts.js";
import { el, fill } from "./dom.js";
import { whole } from "./format.js";

const ROW = 34; // px for each leaf
let made = null;

/** Show the tree of a sample. `open` gets the number of a sequence that is chosen. */
export function showTree(body, data, open) {
  closeTree();
  const last = data.sequences.length - 1;
  const colours = palette();
  const name = (index) => (index === last ? "main" : `branch ${index + 1}`);
  const node = (one) => {
    const leaf = !one.children.length;
    const index = one.sequences[0];
    const facts = data.sequences[index];
    const length = one.end - one.start;
    const text = leaf
      ? `${one.sequences.map(name).join(", ")}  +${whole(length)} · ${(facts.end ?? "").replaceAll("_", " ")} · ${whole(facts.length)} tokens`
      : `${whole(length)} tokens`;
    const colour = one.sequences.includes(last) ? colours.series[0] : colours.muted;
    return {
      name: text,
      value: one,
      symbolSize: leaf ? 9 : 7,
      itemStyle: { color: colour, borderColor: colour },
      lineStyle: {
        color: one.sequences.includes(last) ? colours.series[0] : colours.muted,
        width: 1.6,
        opacity: one.sequences.includes(last) ? 1 : 0.45,
      },
      label: {
        position: leaf ? "right" : "top",
        align: leaf ? "left" : "center",
        color: leaf ? colours.text : colours.muted,
      },
      children: one.children.map(node),
    };
  };
  const box = el("div", { class: "tree", role: "img", "aria-label": "Tree of the sample's branches" });
  fill(
    body,
    el(
      "p",
      { class: "hint" },
      `${data.sequences.length} token sequences. A node is a stretch of tokens that the sequences after it share; a number says how long it is. Choose a leaf to see its tokens.`,
    ),
    box,
    el(
      "ul",
      { class: "leaves" },
      data.sequences.map((one, index) =>
        el(
          "li",
          {},
          el("button", { type: "button", class: "link", onclick: () => open(index) }, name(index)),
          ` ${whole(one.length)} tokens, ${whole(one.turns)} ${one.turns === 1 ? "turn" : "turns"}, ${(one.end ?? "").replaceAll("_", " ")}`,
        ),
      ),
    ),
  );
  box.style.height = `${Math.max(160, leaves(data.tree) * ROW + 40)}px`;
  made = chart(box);
  made.chart.setOption({
    animation: false,
    tooltip: {
      trigger: "item",
      appendTo: "body",
      className: "tip",
      padding: 0,
      backgroundColor: "transparent",
      borderWidth: 0,
      extraCssText: "box-shadow:none",
      formatter: ({ value }) =>
        tip(value.sequences.map(name).join(", "), [
          [null, "from token", whole(value.start)],
          [null, "to token", whole(value.end)],
        ]),
    },
    series: [
      {
        type: "tree",
        data: [node(data.tree)],
        left: 60,
        right: 250,
        top: 20,
        bottom: 20,
        orient: "LR",
        expandAndCollapse: false,
        initialTreeDepth: -1,
        symbol: "circle",
        lineStyle: { curveness: 0.5 },
        label: { fontSize: 11.5, fontFamily: font(), distance: 7 },
        roam: false,
        emphasis: { focus: "none" },
      },
    ],
  });
  made.chart.on("click", ({ data: of }) => of?.value && !of.value.children.length && open(of.value.sequences[0]));
}

function leaves(one) {
  return one.children.length ? one.children.reduce((sum, child) => sum + leaves(child), 0) : 1;
}

export function closeTree() {
  made?.dispose();
  made = null;
}
