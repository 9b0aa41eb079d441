// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// The table of open tunnels.

import { bytesText, setAttribute, span } from "./base.js"
import { act } from "./actions.js"
import { chosenPolicy, isOfPolicy, policyColumn, policyNote } from "./policies.js"
import { Source, filter, words } from "./source.js"
import { age, state } from "./state.js"
import { Table, actionCell, showLines, shown, text, twoLines, who } from "./table.js"

const close = (t) => act("close", { tunnel: t.id }, `Closed the tunnel to ${t.target}.`)

export const tunnels = new Table("tunnels", {
	key: (t) => String(t.id),
	sort: "started",
	order: 1,
	empty: "No open tunnels.",
	columns: [
		{
			name: "target", label: "Target", value: (t) => t.target, first: 1, class: "grow", make: twoLines,
			show(cell, t, kept) {
				showLines(kept, t.target, who(t) + policyNote(t))
				setAttribute(cell, "title", `${t.target} (${t.address})`)
			},
		},
		{ name: "client", label: "Client", value: (t) => t.client, first: 1, class: "mid", show: text(who) },
		policyColumn(),
		{ name: "proto", label: "Protocol", value: (t) => t.proto, first: 1, class: "soft mid", show: text((t) => t.proto) },
		{ name: "started", label: "Age", value: (t) => age(t.started), first: 1, class: "num", show: text((t) => span(age(t.started))) },
		{ name: "idle", label: "Idle", value: (t) => t.idle_seconds, class: "num mid", show: text((t) => (t.idle_seconds < 1.5 ? "–" : span(t.idle_seconds))) },
		{ name: "up", label: "Up", value: (t) => t.bytes_up, class: "num mid", show: text((t) => bytesText(t.bytes_up)) },
		{ name: "down", label: "Down", value: (t) => t.bytes_down, class: "num mid", show: text((t) => bytesText(t.bytes_down)) },
		{
			name: "do", hidden: "Actions", class: "do", make: actionCell(["Close", (t) => close(t)]),
			show(cell, t, kept) {
				cell.hidden = !state.canAct
				setAttribute(kept.buttons[0], "aria-label", `Close tunnel ${t.id} to ${t.target}`)
			},
		},
	],
})

const source = new Source("tunnels", tunnels, () => {
	const q = filter("tunnels-filter")
	const policy = chosenPolicy()
	const sort = { started: "started", idle: "idle" }[tunnels.sort]
	if (!q && !policy && (!sort || (sort === "started" && tunnels.order > 0))) return null
	const query = new URLSearchParams({ limit: 200 })
	if (sort) query.set("sort", sort)
	if (sort) query.set("order", (tunnels.order > 0) === (sort === "idle") ? "asc" : "desc") // the youngest tunnel has the latest start
	if (q) query.set("q", q)
	if (policy) query.set("policy", policy)
	return query.toString()
})

export function showTunnels() {
	const like = words("tunnels-filter")
	const list = source.list().filter((t) => isOfPolicy(t) && [t.client, t.target, t.user ?? ""].some((part) => part.toLowerCase().includes(like)))
	tunnels.show(tunnels.sorted(list), like || chosenPolicy() ? "No matching tunnels." : undefined)
	shown("tunnels-count", list.length, state.snapshot.tunnels.total)
}
