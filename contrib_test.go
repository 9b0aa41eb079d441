// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// TestContribNamesMetrics checks that dashboards and alert rules use only existing metrics
// and labels, and that the dashboard shows every metric.
func TestContribNamesMetrics(t *testing.T) {
	program.metrics.Zone("default") // the metrics of zones and policies exist only if there is one
	defer program.metrics.Policy(directivePolicy).Release()
	registry := prometheus.NewPedanticRegistry()
	if err := program.metrics.Register(registry, metricsState); err != nil {
		t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	labels := make(map[string]map[string][]string) // labels and their values, by metric
	var names []string
	for _, family := range families {
		names = append(names, family.GetName())
		values := map[string][]string{"instance": nil, "job": nil}
		for _, metric := range family.Metric {
			for _, label := range metric.Label {
				values[label.GetName()] = append(values[label.GetName()], label.GetValue())
			}
			if metric.Histogram != nil {
				values["le"] = nil
			}
		}
		for _, label := range []string{"zone", "policy"} {
			if _, ok := values[label]; ok {
				values[label] = nil // any name
			}
		}
		labels[family.GetName()] = values
	}
	labels["caddy_async_proxy_refusals_total"]["reason"] = nil // too many to list
	for name, values := range limiterMetrics(t) {
		labels[name] = values
	}
	asked := func(file string) []string {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(file, ".json") && !json.Valid(data) {
			t.Errorf("%s is not JSON", file)
		}
		list, wrong := contribAsks(string(data), labels)
		for _, what := range wrong {
			t.Errorf("%s uses %s, which does not exist", file, what)
		}
		return list
	}
	shown := asked("contrib/grafana/async_proxy.json")
	for _, name := range names {
		if !slices.Contains(shown, name) {
			t.Errorf("the dashboard does not show %s", name)
		}
	}
	asked("contrib/prometheus/rules.yml")
	asked("contrib/prometheus/tests.yml")
}

// limiterMetrics returns the labels of the metrics of the limiter redis, which is a module of
// its own. It reads them from the source.
func limiterMetrics(t *testing.T) map[string]map[string][]string {
	t.Helper()
	source, err := os.ReadFile("redis/metrics.go")
	if err != nil {
		t.Fatal(err)
	}
	labels := make(map[string]map[string][]string)
	metric := regexp.MustCompile(`(?s)Name:\s+"(\w+)".*?\n\t\}(?:, \[\]string\{"(\w+)"\})?\)`)
	for _, match := range metric.FindAllStringSubmatch(string(source), -1) {
		labels[match[1]] = map[string][]string{"instance": nil, "job": nil}
		if match[2] != "" {
			labels[match[1]][match[2]] = nil
		}
	}
	if len(labels) != 3 {
		t.Fatalf("redis/metrics.go has the metrics %v", labels)
	}
	return labels
}

// contribAsks returns the metrics that a file uses, and those metrics and labels that do
// not exist. Labels without listed values may have any.
func contribAsks(text string, labels map[string]map[string][]string) (names, wrong []string) {
	text = strings.ReplaceAll(text, `\"`, `"`) // in JSON
	var (
		selector = regexp.MustCompile(`(caddy_async_proxy_\w+)(?:\{([^}]*)\})?`)
		matcher  = regexp.MustCompile(`(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"`)
		grouping = regexp.MustCompile(`\b(?:by|without|on|ignoring)\s*\(([^)]*)\)`)
	)
	for line := range strings.Lines(text) {
		var of []string // the line's metrics
		for _, match := range selector.FindAllStringSubmatch(line, -1) {
			name := match[1]
			for _, suffix := range []string{"_bucket", "_count", "_sum"} {
				name = strings.TrimSuffix(name, suffix)
			}
			known, ok := labels[name]
			if !ok {
				wrong = append(wrong, name)
				continue
			}
			names, of = append(names, name), append(of, name)
			for _, match := range matcher.FindAllStringSubmatch(match[2], -1) {
				label, operator, value := match[1], match[2], match[3]
				values, ok := known[label]
				if !ok {
					wrong = append(wrong, name+" by "+label)
				}
				alternatives := []string{value}
				if strings.HasSuffix(operator, "~") {
					alternatives = strings.Split(value, "|")
				}
				for _, value := range alternatives {
					if values != nil && !slices.Contains(values, value) {
						wrong = append(wrong, name+" with "+label+" "+value)
					}
				}
			}
		}
		for _, match := range grouping.FindAllStringSubmatch(line, -1) {
			for label := range strings.FieldsFuncSeq(match[1], func(c rune) bool { return c == ',' || c == ' ' }) {
				if len(of) > 0 && !slices.ContainsFunc(of, func(name string) bool { _, ok := labels[name][label]; return ok }) {
					wrong = append(wrong, of[0]+" by "+label)
				}
			}
		}
	}
	return names, wrong
}

func TestContribAsks(t *testing.T) {
	labels := map[string]map[string][]string{"caddy_async_proxy_a": {"kind": {"x", "y"}, "instance": nil}, "caddy_async_proxy_b": {"le": nil}}
	for text, want := range map[string]string{
		`sum by (kind) (rate(caddy_async_proxy_a{kind=~"x|y",instance="$i"}[5m]))`: "",
		`sum by (le) (caddy_async_proxy_b_bucket)`:                                 "",
		`caddy_async_proxy_c`:                              "caddy_async_proxy_c",
		`caddy_async_proxy_a{sort="x"}`:                    "caddy_async_proxy_a by sort",
		`{"expr": "caddy_async_proxy_a{kind=\"z\"}"}`:      "caddy_async_proxy_a with kind z",
		`caddy_async_proxy_a{kind!~"x|z"}`:                 "caddy_async_proxy_a with kind z",
		`sum by (kind, sort) (caddy_async_proxy_a)`:        "caddy_async_proxy_a by sort",
		`sum by (instance, le) (caddy_async_proxy_a) == 1`: "caddy_async_proxy_a by le",
	} {
		if _, wrong := contribAsks(text, labels); strings.Join(wrong, ", ") != want {
			t.Errorf("%s: %q, want %q", text, wrong, want)
		}
	}
}

func TestContribRules(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is not installed; apt-get install prometheus")
	}
	for _, args := range [][]string{{"check", "rules", "rules.yml"}, {"test", "rules", "tests.yml"}} {
		cmd := exec.Command(promtool, args...)
		cmd.Dir = "contrib/prometheus"
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %v: %v\n%s", args, err, out)
		}
	}
}
