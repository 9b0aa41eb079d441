// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// The policies of the proxies, of which one can be shown alone.

import { $, make, setText } from "./base.js"
import { state } from "./state.js"

// ownPolicy stands for the directive's own options in requests to the server.
export const ownPolicy = "default"

let policies = [] // the names of all; empty: there are only the directive's own options

// chosenPolicy returns the policy to show alone, or "".
export const chosenPolicy = () => $("policy").value

export const isOfPolicy = (row) => !chosenPolicy() || (row.policy ?? ownPolicy) === chosenPolicy()

export const policyNote = (row) => (row.policy ? ` · ${row.policy}` : "")

// policyColumn returns the column for the policy, which is hidden while there are none.
export const policyColumn = () => ({
	name: "policy", label: "Policy", value: (row) => row.policy ?? "", first: 1, class: "soft mid",
	show(cell, row) {
		cell.hidden = !policies.length
		setText(cell, row.policy ?? "–")
	},
})

// showPolicyHead shows or hides the head of that column.
export function showPolicyHead(table) {
	table.heads[table.columns.findIndex((column) => column.name === "policy")].hidden = !policies.length
}

// listPolicies offers the policies of the snapshot to choose from.
export function listPolicies() {
	const { snapshot } = state
	const rows = [...snapshot.clients.clients, ...snapshot.tunnels.tunnels, ...snapshot.refusals.refusals, ...snapshot.settings.flatMap((s) => s.policies ?? [])]
	const names = [...new Set(rows.map((row) => row.policy).filter(Boolean))].sort()
	if (names.join() === policies.join()) return
	policies = names
	const chosen = chosenPolicy()
	const option = (value, label) => make("option", { value }, label)
	$("policy").replaceChildren(option("", "All policies"), option(ownPolicy, "Without a policy"), ...names.map((name) => option(name, name)))
	$("policy").value = [ownPolicy, ...names].includes(chosen) && names.length ? chosen : ""
	$("policies").hidden = !names.length
}
