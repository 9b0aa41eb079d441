// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// defaultPACPath is the value of serve_pac without a path.
const defaultPACPath = "/proxy.pac"

// isPAC reports whether a request is for the proxy auto-configuration file.
func (p *proxy) isPAC(r *http.Request) bool {
	return p.config.ServePAC != "" && r.URL.Path == p.config.ServePAC && (r.Method == http.MethodGet || r.Method == http.MethodHead)
}

// servePAC responds with a script that tells a browser when to use this proxy. The script
// names the proxy by the address at which the browser requested it.
func (p *proxy) servePAC(w http.ResponseWriter, r *http.Request) int {
	head, rules := pacHead(r), p.pacRules()
	header := w.Header()
	header["Content-Type"] = []string{"application/x-ns-proxy-autoconfig"}
	header["Cache-Control"] = []string{"max-age=300"}
	header["Content-Length"] = []string{fmt.Sprint(len(head) + len(rules))}
	startWriteIdleTimeout(r)
	w.WriteHeader(http.StatusOK)
	if r.Method != http.MethodHead {
		_, _ = io.WriteString(w, head)
		_, _ = io.WriteString(w, rules)
	}
	return http.StatusOK
}

// pacHead returns the beginning of the script, with the proxy's address as the browser
// knows it.
func pacHead(r *http.Request) string {
	kind, port := "PROXY", ":80"
	if r.TLS != nil {
		kind, port = "HTTPS", ":443"
	}
	host := r.Host
	if _, _, found := hostport.Split(host); !found {
		host += port
	}
	name, _, _ := hostport.Split(r.Host)
	return fmt.Sprintf("var proxy = %s;\nvar own = %s;\n", access.QuoteJS(kind+" "+host), access.QuoteJS(strings.ToLower(strings.Trim(name, "[]"))))
}

// makePACRules returns the rest of the script, which is the same for all clients.
//
// It returns DIRECT only for destinations that the proxy closes by default to clients on
// other machines and for those that the operator lists. The browser may be able to reach
// them, and if not, its own error message is better. Destinations that a rule denies go to
// the proxy, which says why, so that the script offers no way around the rule.
//
// The script does not contain the rules, because everyone may read it. If a rule allows
// part of a class of addresses or names that is closed by default, the script sends the
// whole class to the proxy. It never resolves names: the proxy does.
func (p *proxy) makePACRules() string {
	var b strings.Builder
	b.WriteString(`function FindProxyForURL(url, host) {
	host = host.toLowerCase().replace(/^\[|\]$/g, "").replace(/\.$/, "");
	var ip6 = host.indexOf(":") >= 0, ip4 = /^\d+\.\d+\.\d+\.\d+$/.test(host);
	function is(name) { return host == name; }
	function below(name) { return !ip4 && host.length > name.length && host.slice(-name.length - 1) == "." + name; }
	function within(net, mask) { return ip4 && isInNet(host, net, mask); }
	function bits(address) {
		var ends = address.split("::"), head = ends[0] ? ends[0].split(":") : [], tail = ends[1] ? ends[1].split(":") : [], all = "";
		while (head.length + tail.length < 8) head.push("0");
		head = head.concat(tail);
		for (var i = 0; i < 8; i++) all += ("000000000000000" + parseInt(head[i], 16).toString(2)).slice(-16);
		return all;
	}
	function within6(net, length) { return ip6 && bits(host).slice(0, length) == bits(net).slice(0, length); }
	if (is(own)) return "DIRECT";
`)
	for _, name := range p.config.Hosts {
		fmt.Fprintf(&b, "\tif (is(%s)) return \"DIRECT\";\n", access.QuoteJS(strings.ToLower(name)))
	}
	var direct []string
	if p.pacDirect != nil {
		direct = p.pacDirect.Conditions()
	}
	for _, condition := range append(direct, access.ClosedConditions(p.directive.dialer.Access.Sets)...) {
		fmt.Fprintf(&b, "\tif (%s) return \"DIRECT\";\n", condition)
	}
	b.WriteString("\treturn proxy;\n}\n")
	return b.String()
}
