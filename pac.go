// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// isPAC reports whether a request is for the proxy auto-configuration file.
func (h *Handler) isPAC(r *http.Request) bool {
	return h.ServePAC != "" && r.URL.Path == h.ServePAC && (r.Method == http.MethodGet || r.Method == http.MethodHead)
}

// servePAC responds with a script that tells a browser when to use this proxy. The script
// names the proxy by the address at which the browser requested it.
func (h *Handler) servePAC(w http.ResponseWriter, r *http.Request) int {
	head, rules := pacHead(r), h.pacRules()
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
	return fmt.Sprintf("var proxy = %s;\nvar own = %s;\n", quoteJS(kind+" "+host), quoteJS(strings.ToLower(strings.Trim(name, "[]"))))
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
func (h *Handler) makePACRules() string {
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
	for _, name := range h.Hosts {
		fmt.Fprintf(&b, "\tif (is(%s)) return \"DIRECT\";\n", quoteJS(strings.ToLower(name)))
	}
	var direct []string
	if h.pacDirect != nil {
		direct = h.pacDirect.conditions()
	}
	for _, condition := range append(direct, closedConditions(h.dialer.policy.sets)...) {
		fmt.Fprintf(&b, "\tif (%s) return \"DIRECT\";\n", condition)
	}
	b.WriteString("\treturn proxy;\n}\n")
	return b.String()
}

// closedConditions returns the conditions for destinations that are closed by default, as
// far as a browser can tell. It omits classes of which a rule allows a part.
func closedConditions(sets []*ruleSet) (list []string) {
	allowed := func(condition func(*ruleSet) bool) bool {
		return slices.ContainsFunc(sets, func(s *ruleSet) bool { return !s.deny && condition(s) })
	}
	for _, class := range slices.Concat(slices.Collect(notPublic.AllSorted4()), closedIPv6) {
		if !allowed(func(s *ruleSet) bool {
			return len(s.sources) > 0 || s.prefixes.OverlapsPrefix(class) || s.private && !neverReachable.LookupPrefix(class)
		}) {
			list = append(list, prefixCondition(class))
		}
	}
	named := func(condition func(name string) bool) bool {
		return allowed(func(s *ruleSet) bool {
			for name := range s.names {
				if condition(name) {
					return true
				}
			}
			for name := range s.domains {
				if condition("*." + name) {
					return true
				}
			}
			return false
		})
	}
	for _, class := range [...]struct {
		condition string
		contains  func(name string) bool
	}{
		{`is("localhost")`, func(name string) bool { return name == "localhost" }},
		{`!ip4 && !ip6 && !is("localhost") && host.indexOf(".") < 0`, func(name string) bool { return name != "localhost" && !strings.Contains(name, ".") }},
		{`below("localhost")`, func(name string) bool { return strings.HasSuffix(name, ".localhost") }},
		{`below("local")`, func(name string) bool { return strings.HasSuffix(name, ".local") }},
	} {
		if !named(class.contains) {
			list = append(list, class.condition)
		}
	}
	return list
}

// closedIPv6 lists the IPv6 ranges that are commonly regarded as private.
var closedIPv6 = []netip.Prefix{
	netip.MustParsePrefix("::/128"), netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("2001:db8::/32"),
	netip.MustParsePrefix("fc00::/7"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("fec0::/10"), netip.MustParsePrefix("ff00::/8"),
}

// quoteJS returns a string as a JavaScript literal.
func quoteJS(s string) string {
	b, _ := json.Marshal(s) // never fails
	return string(b)
}

// conditions returns the script's conditions for the destinations in the set, which must
// not have ports.
func (s *ruleSet) conditions() (list []string) {
	for name := range s.names {
		list = append(list, "is("+quoteJS(name)+")")
	}
	for name := range s.domains {
		list = append(list, "below("+quoteJS(name)+")")
	}
	for prefix := range s.prefixes.All() {
		list = append(list, prefixCondition(prefix))
	}
	slices.Sort(list)
	return list
}

// prefixCondition returns the script's condition for an address in a range.
func prefixCondition(prefix netip.Prefix) string {
	if prefix.Addr().Is6() {
		return fmt.Sprintf("within6(%q, %d)", prefix.Addr(), prefix.Bits())
	}
	mask := uint32(0xffffffff) << (32 - prefix.Bits())
	return fmt.Sprintf("within(%q, \"%d.%d.%d.%d\")", prefix.Addr(), byte(mask>>24), byte(mask>>16), byte(mask>>8), byte(mask))
}

// newPACDirect parses the destinations that browsers reach directly.
func newPACDirect(texts []string) (*ruleSet, error) {
	s, err := newDirectSet(texts)
	if err == nil && (s.all || s.public || s.private) {
		err = errors.New("all, public and private are not allowed")
	}
	return s, err
}
