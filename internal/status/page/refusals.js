// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// The refusals on the status page, grouped by cause, with the line of a Caddyfile that
// would allow what was refused.

import { clock, count, make, note, seconds, setAttribute, setText } from "./base.js"
import { chosenPolicy, isOfPolicy, policyColumn, policyNote } from "./policies.js"
import { Source, filter, words } from "./source.js"
import { ago, state } from "./state.js"
import { Table, showLines, shown, text, twoLines, who } from "./table.js"

// causeOf returns why the proxy refused the requests, or what failed upstream.
const causeOf = (r) => r.cause ?? r.reason

// what is refused: the target, and the method if that is the reason.
const what = (r) => (r.method ? `${r.method} ${r.target}` : r.target)

// why says which rule denies the target, or else what the client was told.
const why = (r) => r.rule ?? r.detail

const dateTime = (time) => `${new Date(time).toLocaleDateString("en-CA")} ${clock(seconds(time))}`

// isAbout reports whether a refusal matches the words of the filter, as the server does it.
const isAbout = (r, words) => [causeOf(r), r.reason, r.client, r.user ?? "", r.target, r.rule ?? ""].some((part) => part.toLowerCase().includes(words))

const time = (name, label, more) => ({
	name, label, value: (r) => r[name], class: `num soft ${more}`,
	show(cell, r) {
		setText(cell, ago(r[name]))
		setAttribute(cell, "title", dateTime(r[name]))
	},
})
export const refusals = new Table("refusals", {
	key: (r) => [causeOf(r), r.reason, r.client, r.user, r.policy, r.method, r.target, r.rule, r.address].join("\n"),
	sort: "last",
	empty: "No refusals yet.",
	group: (r) => (r.cause ? "denied " : "failed ") + causeOf(r),
	showGroup(cell, first) {
		const cause = state.snapshot.refusals.causes.find((c) => c.cause === first.cause && (c.cause ?? c.reason) === causeOf(first))
		if (!cell.firstChild) cell.append(make("span"), make("span", { class: "count" }))
		setText(cell.firstChild, causeOf(first))
		if (cause) setText(cell.lastChild, countsOf(cause))
	},
	columns: [
		{
			name: "target", label: "Target", value: (r) => r.target, first: 1, class: "grow", make: twoLines,
			show(cell, r, kept) {
				showLines(kept, what(r), `${who(r)}${policyNote(r)} · ${why(r)}`)
				setAttribute(cell, "title", r.address ? `${what(r)} (${r.address}): ${r.detail}` : `${what(r)}: ${r.detail}`)
			},
		},
		{ name: "client", label: "Client", value: who, first: 1, class: "mid", show: text(who) },
		policyColumn(),
		{
			name: "rule", label: "Rule", value: why, first: 1, class: "mid why",
			show(cell, r) {
				setText(cell, why(r))
				setAttribute(cell, "title", `${r.detail} (${r.reason})`)
			},
		},
		{
			name: "status", label: "Status", value: (r) => r.status, class: "num mid",
			show(cell, r) {
				setText(cell, String(r.status))
				setAttribute(cell, "class", `num mid status ${r.status >= 500 ? "s5" : "s4"}`)
			},
		},
		{ name: "count", label: "Count", value: (r) => r.count, class: "num", show: text((r) => count(r.count)) },
		time("first", "First", "mid"),
		time("last", "Last", "mid"),
		{ name: "do", hidden: "What would allow it", class: "do", make: allowCell, show: showAllow },
	],
})

const source = new Source("refusals", refusals, () => {
	const q = filter("refusals-filter")
	const policy = chosenPolicy()
	const remote = ["last", "first", "count"].includes(refusals.sort)
	if (!q && !policy && (!remote || (refusals.sort === "last" && refusals.order < 0))) return null
	const query = new URLSearchParams({ limit: 200 })
	if (remote) query.set("sort", refusals.sort)
	if (remote) query.set("order", refusals.order > 0 ? "asc" : "desc")
	if (q) query.set("q", q)
	if (policy) query.set("policy", policy)
	return query.toString()
})

export function showRefusals() {
	const about = words("refusals-filter")
	const list = source.list().filter((r) => isOfPolicy(r) && isAbout(r, about))
	refusals.show(refusals.sorted(list), about || chosenPolicy() ? "No matching refusals." : undefined)
	shown("refusals-count", list.length, state.snapshot.refusals.total)
}

function countsOf(cause) {
	const noun = cause.cause ? "refusal" : "failure"
	let text = `${count(cause.count)} ${noun}${cause.count === 1 ? "" : "s"}`
	if (cause.dropped) text += ` · ${count(cause.dropped)} older groups dropped`
	return text
}

// allowCell makes a cell with a button that copies the line, or with the hint if there is none.
function allowCell(cell, kept) {
	kept.copy = make("button", { type: "button" }, "Copy allow line")
	kept.copy.addEventListener("click", () => copy(kept.row))
	kept.hint = make("span", { class: "soft" })
	cell.append(kept.copy, kept.hint)
}

function showAllow(_, r, kept) {
	kept.copy.hidden = !r.allow
	kept.hint.hidden = !!r.allow || !r.hint
	setText(kept.hint, r.hint ?? "")
	setAttribute(kept.hint, "title", r.hint)
	setAttribute(kept.copy, "title", r.allow)
	setAttribute(kept.copy, "aria-label", r.allow ? `Copy allow line: ${r.allow}` : null)
}

// placeOf says where in the Caddyfile a line belongs.
function placeOf(r) {
	const policy = r.policy && r.cause !== "client" ? ` of the policy ${r.policy}` : ""
	if (r.cause === "rule") return `Put it before ${r.rule}${policy && `, in the policy ${r.policy}`}.`
	if (r.cause === "default") return policy && `Put it into the policy ${r.policy}.`
	return `It replaces the option ${r.allow.split(" ")[0]}${policy}.`
}

async function copy(r) {
	const copied = await write(r.allow)
	note(`${copied ? "Copied" : "This browser does not let the page copy"}: ${r.allow}. ${placeOf(r)}`)
}

// write puts a text on the clipboard. Browsers offer navigator.clipboard only to pages from
// localhost or over TLS.
async function write(text) {
	try {
		await navigator.clipboard.writeText(text)
		return true
	} catch {
		const focus = document.activeElement
		const area = make("textarea", { class: "hidden", "aria-hidden": "true" })
		area.value = text
		document.body.append(area)
		area.select()
		const copied = document.execCommand("copy")
		area.remove()
		focus?.focus({ preventScroll: true })
		return copied
	}
}
