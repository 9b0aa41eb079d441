// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/gaissmai/bart"
)

// isPAC reports whether a request is for the proxy auto-configuration file.
func (h *Handler) isPAC(r *http.Request) bool {
	return h.ServePAC != "" && r.URL.Path == h.ServePAC && (r.Method == http.MethodGet || r.Method == http.MethodHead)
}

// servePAC answers with a script that tells a browser when to use this proxy,
// under the very address at which it got the script.
func (h *Handler) servePAC(w http.ResponseWriter, r *http.Request) int {
	head, rules := pacHead(r), h.pacRules()
	header := w.Header()
	header["Content-Type"] = []string{"application/x-ns-proxy-autoconfig"}
	header["Cache-Control"] = []string{"max-age=300"}
	header["Content-Length"] = []string{fmt.Sprint(len(head) + len(rules))}
	w.WriteHeader(http.StatusOK)
	if r.Method != http.MethodHead {
		_, _ = io.WriteString(w, head)
		_, _ = io.WriteString(w, rules)
	}
	return http.StatusOK
}

// pacHead begins the script with the proxy's address as the browser knows it.
func pacHead(r *http.Request) string {
	kind, port := "PROXY", ":80"
	if r.TLS != nil {
		kind, port = "HTTPS", ":443"
	}
	host := r.Host
	if _, _, found := cutPort(host); !found {
		host += port
	}
	own, _, _ := cutPort(r.Host)
	return fmt.Sprintf("var proxy = %s;\nvar own = %s;\n", quote(kind+" "+host), quote(strings.ToLower(strings.Trim(own, "[]"))))
}

// makePACRules writes the rest of the script, which is the same for everybody.
// It goes by names alone, and by addresses that stand in URLs: to resolve a name
// is the proxy's business. What the proxy would refuse to others than those on
// its machine goes DIRECT: it may be in reach of the browser, and if it is not,
// the browser says so better. In doubt the proxy is used: what a rule allows
// must not go past it, what none does it refuses itself.
func (h *Handler) makePACRules() string {
	p := h.dialer.policy
	var b strings.Builder
	b.WriteString(`function FindProxyForURL(url, host) {
	host = host.toLowerCase().replace(/^\[|\]$/g, "").replace(/\.$/, "");
	var at = /^[a-z]+:\/\/[^\/?#]*?:(\d+)(?:[\/?#]|$)/i.exec(url.replace(/^([a-z]+:\/\/)(?:[^\/?#]*@)?(?:\[[^\]]*\])?/i, "$1"));
	var port = at ? +at[1] : /^(https|wss):/i.test(url) ? 443 : 80;
	var ip6 = host.indexOf(":") >= 0, ip4 = /^\d+\.\d+\.\d+\.\d+$/.test(host);
	function below(name) { return !ip4 && host.length > name.length && host.slice(-name.length - 1) == "." + name; }
	function within(net, mask) { return ip4 && isInNet(host, net, mask); }
`)
	// Of IPv6 only some begin as no public address does, or as no other does.
	fmt.Fprintf(&b, "\tvar isPrivate = ip6 ? /^(f[c-f]|::(?!ffff:))/.test(host) : %s;\n", withinAny(notPublic))
	fmt.Fprintf(&b, "\tvar isPublic = ip6 ? /^[23]...:/.test(host) && !/^(2001|2002|3fff):/.test(host) : ip4 && !isPrivate;\n")
	fmt.Fprintf(&b, "\tvar isNobodys = ip6 ? /^(::$|fe[89ab]|ff)/.test(host) : %s;\n", withinAny(notLocal))
	b.WriteString("\tvar isNear = !ip4 && !ip6 && host.indexOf(\".\") < 0 || below(\"localhost\") || below(\"local\");\n")
	b.WriteString("\tif (host == own) return \"DIRECT\";\n")
	for _, name := range h.Hosts {
		fmt.Fprintf(&b, "\tif (host == %s) return \"DIRECT\";\n", quote(strings.ToLower(name)))
	}
	switch {
	case p.reportOnly:
	case p.ports != nil:
		fmt.Fprintf(&b, "\tif (!(%s)) return \"DIRECT\";\n", portsCondition(p.ports))
	default:
		fmt.Fprintf(&b, "\tif (port == %d) return \"DIRECT\";\n", portSMTP)
	}
	for _, s := range p.sets {
		if s.deny && p.reportOnly {
			continue
		}
		conditions, whole := s.conditions()
		if !s.deny && !whole { // nothing behind it may deny what is missing
			b.WriteString("\treturn proxy;\n}\n")
			return b.String()
		}
		if len(conditions) == 0 {
			continue
		}
		verdict := "proxy"
		if s.deny {
			verdict = `"DIRECT"`
		}
		condition := strings.Join(conditions, " || ")
		if s.ports.high > 0 {
			condition = portsCondition([]portRange{s.ports}) + " && (" + condition + ")"
		}
		fmt.Fprintf(&b, "\tif (%s) return %s;\n", condition, verdict)
	}
	b.WriteString("\treturn isPrivate || isNear ? \"DIRECT\" : proxy;\n}\n")
	return b.String()
}

// quote writes a string for JavaScript.
func quote(s string) string {
	b, _ := json.Marshal(s) // never fails
	return string(b)
}

func portsCondition(ports []portRange) string {
	conditions := make([]string, len(ports))
	for i, p := range ports {
		conditions[i] = fmt.Sprintf("port >= %d && port <= %d", p.low, p.high)
	}
	return strings.Join(conditions, " || ")
}

// maxPACConditions bounds what of a set with thousands of entries goes into the
// script.
const maxPACConditions = 1000

// conditions says what a set is about, as far as a browser can tell, and whether
// that is all of it. What cannot be said of a set that denies is left out; one
// that allows has too much instead.
func (s *ruleSet) conditions() (list []string, whole bool) {
	switch {
	case s.all && s.deny:
		return []string{"true"}, true
	case s.all:
		list = append(list, "!ip4 && !ip6 && !isNear") // does not open what is private
	}
	if s.private && s.deny {
		list = append(list, "isPrivate")
	} else if s.private {
		list = append(list, "!isNobodys && (isPrivate || ip6 && !isPublic)")
	}
	if s.public && s.deny {
		list = append(list, "isPublic")
	} else if s.public {
		list = append(list, "isPublic || ip6 && !isPrivate")
	}
	if !s.deny && len(s.sources) > 0 {
		list = append(list, "ip4 || ip6")
	} else if !s.deny && s.prefixes.Size6() > 0 {
		list = append(list, "ip6")
	}
	var names []string
	for name := range s.names {
		names = append(names, "host == "+quote(name))
	}
	for name := range s.domains {
		names = append(names, "below("+quote(name)+")")
	}
	for prefix := range s.prefixes.All4() {
		names = append(names, prefixCondition(prefix))
	}
	slices.Sort(names)
	n := min(len(names), maxPACConditions)
	return append(list, names[:n]...), n == len(names)
}

func prefixCondition(prefix netip.Prefix) string {
	mask := uint32(0xffffffff) << (32 - prefix.Bits())
	return fmt.Sprintf("within(%q, \"%d.%d.%d.%d\")", prefix.Addr(), byte(mask>>24), byte(mask>>16), byte(mask>>8), byte(mask))
}

// withinAny is true of an IPv4 address in one of the table's ranges.
func withinAny(table *bart.Lite) string {
	var conditions []string
	for prefix := range table.AllSorted4() {
		conditions = append(conditions, prefixCondition(prefix))
	}
	return strings.Join(conditions, " || ")
}
