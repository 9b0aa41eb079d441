// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// What all parts of the page know of the server.

import { seconds, span } from "./base.js"

export const state = {
	snapshot: null, // the latest one
	at: 0, // its time in seconds
	canAct: false, // whether the server lets operators act
	masked: false, // whether it shows only networks of clients
	paused: false, // whether the operator has paused the page
}

// age returns how many seconds before the latest snapshot a time was.
export const age = (time) => (time ? state.at - seconds(time) : Infinity)

export const ago = (time) => (!time ? "never" : age(time) < 1.5 ? "now" : `${span(age(time))} ago`)
