// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
)

// isPAC reports whether a request is for the proxy auto-configuration file.
func (h *Handler) isPAC(r *http.Request) bool {
	return h.ServePAC != "" && r.URL.Path == h.ServePAC && (r.Method == http.MethodGet || r.Method == http.MethodHead)
}

// servePAC answers with a script that tells a browser when to use this proxy,
// under the very address at which it got the script.
func (h *Handler) servePAC(w http.ResponseWriter, r *http.Request) int {
	script := h.pac(r)
	header := w.Header()
	header["Content-Type"] = []string{"application/x-ns-proxy-autoconfig"}
	header["Cache-Control"] = []string{"max-age=300"}
	header["Content-Length"] = []string{fmt.Sprint(len(script))}
	w.WriteHeader(http.StatusOK)
	if r.Method != http.MethodHead {
		_, _ = w.Write([]byte(script))
	}
	return http.StatusOK
}

// pac writes the script. It goes by names alone, and by addresses that stand in
// URLs: to resolve a name is the proxy's business. What the proxy would refuse
// goes DIRECT: it may be in reach of the browser, and if it is not, the browser
// says so better.
func (h *Handler) pac(r *http.Request) string {
	kind, port := "PROXY", ":80"
	if r.TLS != nil {
		kind, port = "HTTPS", ":443"
	}
	host := r.Host
	if _, _, found := cutPort(host); !found {
		host += port
	}
	own, _, _ := cutPort(r.Host)
	direct := append([]string{strings.ToLower(strings.Trim(own, "[]"))}, h.Hosts...)

	var b strings.Builder
	fmt.Fprintf(&b, "function FindProxyForURL(url, host) {\n")
	fmt.Fprintf(&b, "\tvar proxy = %s;\n", quote(kind+" "+host))
	b.WriteString(`	host = host.toLowerCase().replace(/^\[|\]$/g, "").replace(/\.$/, "");
	var at = /^[a-z]+:\/\/[^\/?#]*?:(\d+)(?:[\/?#]|$)/i.exec(url.replace(/^([a-z]+:\/\/)(?:[^\/?#]*@)?(?:\[[^\]]*\])?/i, "$1"));
	var port = at ? +at[1] : /^(https|wss):/i.test(url) ? 443 : 80;
	var ip = /^\d+\.\d+\.\d+\.\d+$/.test(host) || host.indexOf(":") >= 0;
	function below(name) { return !ip && host.length > name.length && host.slice(-name.length - 1) == "." + name; }
	function within(net, mask) { return host.indexOf(":") < 0 && ip && isInNet(host, net, mask); }
`)
	fmt.Fprintf(&b, "\tif (!ip && host.indexOf(\".\") < 0 || below(\"localhost\") || below(\"local\")) return \"DIRECT\";\n")
	for _, name := range direct {
		fmt.Fprintf(&b, "\tif (host == %s) return \"DIRECT\";\n", quote(strings.ToLower(name)))
	}
	if ports := h.dialer.policy.ports; ports != nil {
		fmt.Fprintf(&b, "\tif (!(%s)) return \"DIRECT\";\n", portsCondition(ports))
	} else {
		fmt.Fprintf(&b, "\tif (port == %d) return \"DIRECT\";\n", portSMTP)
	}
	for _, s := range h.dialer.policy.sets {
		conditions := s.conditions()
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
	fmt.Fprintf(&b, "\tif (%s) return \"DIRECT\";\n", privateCondition())
	b.WriteString("\treturn proxy;\n}\n")
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
// script. What is missing goes to the proxy, which refuses it.
const maxPACConditions = 1000

// conditions says what a set is about, as far as a browser can tell.
func (s *ruleSet) conditions() []string {
	var list []string
	if s.all {
		if !s.deny {
			return []string{"!ip"} // does not open what is private
		}
		return []string{"true"}
	}
	for name := range s.names {
		list = append(list, "host == "+quote(name))
	}
	for name := range s.domains {
		list = append(list, "below("+quote(name)+")")
	}
	for prefix := range s.prefixes.All4() {
		if len(list) >= maxPACConditions {
			break
		}
		list = append(list, prefixCondition(prefix))
	}
	if s.private {
		list = append(list, privateCondition())
	}
	if s.public {
		list = append(list, "ip && host.indexOf(\":\") < 0 && !("+privateCondition()+")")
	}
	slices.Sort(list)
	return list[:min(len(list), maxPACConditions)]
}

func prefixCondition(prefix netip.Prefix) string {
	mask := uint32(0xffffffff) << (32 - prefix.Bits())
	return fmt.Sprintf("within(%q, \"%d.%d.%d.%d\")", prefix.Addr(), byte(mask>>24), byte(mask>>16), byte(mask>>8), byte(mask))
}

// privateCondition is true of an address in a URL that is not public. Of IPv6
// only a few begin otherwise than public ones.
func privateCondition() string {
	conditions := []string{`/^(f[c-f]|::)/.test(host) && ip`}
	for prefix := range notPublic.AllSorted4() {
		conditions = append(conditions, prefixCondition(prefix))
	}
	return strings.Join(conditions, " || ")
}
