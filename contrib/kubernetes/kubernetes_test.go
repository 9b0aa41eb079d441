// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package kubernetes checks the manifests beside it. It is a module of its own, because nothing else
// needs Kubernetes' types.
package kubernetes

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

// objects are what `kubectl apply -k` would send.
type objects struct {
	namespace  corev1.Namespace
	deployment appsv1.Deployment
	service    corev1.Service
	policy     networkingv1.NetworkPolicy
	budget     policyv1.PodDisruptionBudget
	config     corev1.ConfigMap
}

// build builds the kustomization, and reads each object strictly: an unknown or misspelled field is
// an error.
func build(t *testing.T) *objects {
	t.Helper()
	resources, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), ".")
	if err != nil {
		t.Fatal(err)
	}
	o := new(objects)
	kinds := map[string]any{
		"Namespace": &o.namespace, "Deployment": &o.deployment, "Service": &o.service,
		"NetworkPolicy": &o.policy, "PodDisruptionBudget": &o.budget, "ConfigMap": &o.config,
	}
	for _, resource := range resources.Resources() {
		text, err := resource.AsYAML()
		if err != nil {
			t.Fatal(err)
		}
		into, known := kinds[resource.GetKind()]
		if !known {
			t.Fatalf("no test knows %s", resource.GetKind())
		}
		delete(kinds, resource.GetKind())
		if err := yaml.UnmarshalStrict(text, into); err != nil {
			t.Errorf("%s: %v", resource.GetKind(), err)
		}
	}
	for kind := range kinds {
		t.Errorf("there is no %s", kind)
	}
	return o
}

// TestManifests checks that the objects fit each other and the Caddyfile.
func TestManifests(t *testing.T) {
	o := build(t)
	labels := o.deployment.Spec.Template.Labels
	for what, selector := range map[string]map[string]string{
		"Deployment": o.deployment.Spec.Selector.MatchLabels, "Service": o.service.Spec.Selector,
		"NetworkPolicy": o.policy.Spec.PodSelector.MatchLabels, "PodDisruptionBudget": o.budget.Spec.Selector.MatchLabels,
	} {
		for key, value := range selector {
			if labels[key] != value {
				t.Errorf("the %s selects %s=%s, the pods have %v", what, key, value, labels)
			}
		}
		if len(selector) == 0 {
			t.Errorf("the %s selects everything", what)
		}
	}
	caddyfile := o.config.Data["Caddyfile"]
	ports := make(map[string]int32)
	for _, port := range o.deployment.Spec.Template.Spec.Containers[0].Ports {
		ports[port.Name] = port.ContainerPort
		if !strings.Contains(caddyfile, ":"+strconv.Itoa(int(port.ContainerPort))+" {") {
			t.Errorf("the Caddyfile has no site at port %d", port.ContainerPort)
		}
	}
	names := []intstr.IntOrString{o.service.Spec.Ports[0].TargetPort}
	for _, rule := range o.policy.Spec.Ingress {
		names = append(names, *rule.Ports[0].Port)
	}
	container := o.deployment.Spec.Template.Spec.Containers[0]
	for _, probe := range []*corev1.Probe{container.StartupProbe, container.ReadinessProbe, container.LivenessProbe} {
		if probe.TCPSocket != nil {
			names = append(names, probe.TCPSocket.Port)
		} else {
			names = append(names, probe.HTTPGet.Port)
			if !strings.Contains(caddyfile, "respond "+probe.HTTPGet.Path+" 200") {
				t.Errorf("the Caddyfile does not answer %s", probe.HTTPGet.Path)
			}
		}
	}
	for _, name := range names {
		if name.Type != intstr.String || ports[name.StrVal] == 0 {
			t.Errorf("there is no port %s", name.String())
		}
	}
	for _, namespace := range []string{o.deployment.Namespace, o.service.Namespace, o.policy.Namespace, o.budget.Namespace, o.config.Namespace} {
		if namespace != o.namespace.Name {
			t.Errorf("the namespace is %s, and there is %s", namespace, o.namespace.Name)
		}
	}
}

// TestPod checks that the pod runs without rights, and is given the time to stop that the Caddyfile
// takes.
func TestPod(t *testing.T) {
	o := build(t)
	pod := o.deployment.Spec.Template.Spec
	container := pod.Containers[0]
	switch s, c := pod.SecurityContext, container.SecurityContext; {
	case !*s.RunAsNonRoot || *s.RunAsUser == 0 || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault,
		!*c.ReadOnlyRootFilesystem || *c.AllowPrivilegeEscalation || !slices.Contains(c.Capabilities.Drop, "ALL"),
		*pod.AutomountServiceAccountToken, o.namespace.Labels["pod-security.kubernetes.io/enforce"] != "restricted":
		t.Errorf("the pod has rights: %v %v", s, c)
	}
	grace := regexp.MustCompile(`grace_period (\d+)s`).FindStringSubmatch(o.config.Data["Caddyfile"])
	if grace == nil {
		t.Fatal("the Caddyfile has no grace_period")
	}
	seconds, _ := strconv.ParseInt(grace[1], 10, 64)
	if sum := seconds + container.Lifecycle.PreStop.Sleep.Seconds; *pod.TerminationGracePeriodSeconds < sum+5 {
		t.Errorf("the pod is killed after %d s, Caddy needs %d s", *pod.TerminationGracePeriodSeconds, sum)
	}
	volume := pod.Volumes[0]
	if volume.ConfigMap == nil || volume.ConfigMap.Name != o.config.Name || o.config.Name == "async-proxy" {
		t.Errorf("the pod mounts %v, the file is in %s", volume.ConfigMap, o.config.Name)
	}
	if container.Image == "async-proxy" || !strings.Contains(container.Image, ":") {
		t.Errorf("the image is %s", container.Image)
	}
	if *o.deployment.Spec.Replicas < 2 || o.budget.Spec.MaxUnavailable.IntVal >= *o.deployment.Spec.Replicas {
		t.Error("a drained node may leave no pod")
	}
}
