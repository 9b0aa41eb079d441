// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// The targets with the most requests and the most bytes, on the status page.

import { bytesText, count, setAttribute, setText } from "./base.js"
import { state } from "./state.js"
import { Table, shown, text } from "./table.js"

// amount makes a column for what is counted. A target that was not listed all the time may have
// had more; one that is not listed by the column has no number in it.
const amount = (name, label, write) => ({
	name, label, value: (t) => t[name] ?? -1, class: "num",
	show(cell, t) {
		const before = t[`${name}_before`]
		setText(cell, t[name] == null ? "–" : (before ? "≥ " : "") + write(t[name]))
		setAttribute(cell, "title", before ? `and at most ${write(before)} before it was listed` : null)
	},
})

export const targets = new Table("targets", {
	key: (t) => t.target,
	sort: "requests",
	empty: "No targets yet.",
	columns: [
		{ name: "target", label: "Target", value: (t) => t.target, first: 1, class: "wrap", show: text((t) => t.target) },
		amount("requests", "Requests", count),
		amount("bytes", "Traffic", bytesText),
	],
})

export function showTargets() {
	const { targets: list, total } = state.snapshot.targets
	targets.show(targets.sorted(list))
	shown("targets-count", list.length, total)
}
