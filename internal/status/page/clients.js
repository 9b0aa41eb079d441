// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// The table of clients.

import { $, bytesText, count, digits, seconds, setAttribute, setText, short, make, span } from "./base.js"
import { act, block, unblock } from "./actions.js"
import { chosenPolicy, isOfPolicy, ownPolicy, policyColumn } from "./policies.js"
import { clientKey, rateOf } from "./samples.js"
import { Source, filter, words } from "./source.js"
import { age, ago, state } from "./state.js"
import { Table, actionCell, shown, text } from "./table.js"

const isBlocked = (c) => c.blocked_until && seconds(c.blocked_until) > state.at
const isLimited = (c) => c.tokens < 1

// tokens are rounded down: a fraction of a token does not admit a request.
const tokens = (n) => (n < 10 ? digits(Math.floor(n * 10) / 10) : count(Math.floor(n)))

// With several zones, the same client may have several rows.
let manyZones = false
const inZone = (c) => (manyZones ? ` in zone ${c.zone}` : "") + (c.policy ? ` in policy ${c.policy}` : "")

const refill = (c) => act("refill", { client: c.client, zone: c.zone, policy: c.policy ?? ownPolicy }, `${c.client} has a full bucket${inZone(c)}.`)

function named(cell, kept) {
	kept.name = make("span")
	kept.zone = make("span", { class: "zone" })
	kept.policy = make("span", { class: "sub" })
	kept.badge = make("span")
	cell.append(kept.name, kept.zone, kept.policy, kept.badge)
}

export const clients = new Table("clients", {
	key: clientKey,
	sort: "last_seen",
	empty: "No clients yet.",
	classes: (c) => (isBlocked(c) ? "blocked" : isLimited(c) ? "limited" : ""),
	columns: [
		{
			name: "client", label: "Client", value: (c) => c.client, first: 1, class: "wrap", make: named,
			show(_, c, kept) {
				setText(kept.name, c.client)
				setText(kept.zone, manyZones ? ` ${c.zone}` : "")
				setText(kept.policy, c.policy ?? "")
				const now = isBlocked(c) ? "blocked" : isLimited(c) ? "limited" : ""
				setText(kept.badge, now === "blocked" ? `blocked, ${span(seconds(c.blocked_until) - state.at)} left` : now)
				setAttribute(kept.badge, "class", now ? `badge ${now}` : "")
			},
		},
		policyColumn(),
		{
			name: "tokens", label: "Bucket", value: (c) => c.tokens, first: 1,
			make(cell, kept) {
				kept.meter = make("meter", { min: 0 })
				kept.tokens = make("span", { class: "num" })
				cell.append(make("div", { class: "bucket" }, kept.meter, kept.tokens))
			},
			show(_, c, kept) {
				setAttribute(kept.meter, "max", c.burst)
				setAttribute(kept.meter, "low", 1)
				setAttribute(kept.meter, "high", Math.max(1, c.burst / 4))
				setAttribute(kept.meter, "optimum", c.burst)
				setAttribute(kept.meter, "value", Math.round(c.tokens * 100) / 100)
				setAttribute(kept.meter, "aria-label", `Tokens of ${c.client}${inZone(c)}`)
				setText(kept.tokens, `${tokens(c.tokens)} / ${count(c.burst)}`)
			},
		},
		{ name: "rate", label: "Req/s", class: "num mid", show: text((c) => short(rateOf(c))) },
		{ name: "requests", label: "Requests", value: (c) => c.requests, class: "num mid", show: text((c) => count(c.requests)) },
		{ name: "rejections", label: "Rejected", value: (c) => c.rejections, class: "num", show: text((c) => count(c.rejections)) },
		{ name: "tunnels", label: "Tunnels", value: (c) => c.tunnels, class: "num mid", show: text((c) => count(c.tunnels)) },
		{ name: "bytes", label: "Traffic", value: (c) => c.bytes_up + c.bytes_down, class: "num mid", show: text((c) => bytesText(c.bytes_up + c.bytes_down)) },
		// Sort in steps of five seconds, so that active rows do not jump around.
		{ name: "last_seen", label: "Last seen", value: (c) => -Math.floor(age(c.last_seen) / 5), class: "num mid soft", show: text((c) => ago(c.last_seen)) },
		{
			name: "do", hidden: "Actions", class: "do",
			make: actionCell(["Refill", (c) => refill(c)], ["Block", (c) => (isBlocked(c) ? unblock(c) : block(c))]),
			show(cell, c, kept) {
				cell.hidden = !state.canAct
				setText(kept.buttons[1], isBlocked(c) ? "Unblock" : "Block")
				setAttribute(kept.buttons[0], "aria-label", `Refill the bucket of ${c.client}${inZone(c)}`)
				setAttribute(kept.buttons[1], "aria-label", `${isBlocked(c) ? "Unblock" : "Block"} ${c.client}${manyZones ? " in all zones" : ""}`)
			},
		},
	],
})

const source = new Source("clients", clients, () => {
	const q = filter("clients-filter")
	const limited = $("clients-limited").checked
	const policy = chosenPolicy()
	const remote = ["tokens", "requests", "rejections", "bytes", "tunnels", "last_seen"].includes(clients.sort)
	if (!q && !limited && !policy && (!remote || (clients.sort === "last_seen" && clients.order < 0))) return null
	const query = new URLSearchParams({ limit: 100 })
	if (remote) query.set("sort", clients.sort)
	if (remote) query.set("order", clients.order > 0 ? "asc" : "desc")
	if (q) query.set("q", q)
	if (limited) query.set("limited", "")
	if (policy) query.set("policy", policy)
	return query.toString()
})

export function showClients() {
	const all = state.snapshot.clients
	const fitting = words("clients-filter")
	const limited = $("clients-limited").checked
	let list = source.list()
	manyZones = new Set([...all.clients, ...list].map((c) => c.zone)).size > 1
	list = list.filter((c) => isOfPolicy(c) && c.client.toLowerCase().includes(fitting) && (!limited || isLimited(c) || isBlocked(c)))
	clients.show(clients.sorted(list), fitting || limited || chosenPolicy() ? "No matching clients." : undefined)
	shown("clients-count", list.length, all.total)
}
