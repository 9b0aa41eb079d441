// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

// Listeners are the addresses on which the running proxies listen, each of them once.
type Listeners struct {
	Listeners []Listener `json:"listeners"`
}

// Listener is one address, and how clients must speak to it.
type Listener struct {
	Network       string `json:"network"` // tcp or unix
	Address       string `json:"address"`
	TLS           bool   `json:"tls"`
	ProxyProtocol bool   `json:"proxy_protocol"` // may be required before anything else
}
